"""The token-chunk schedule of the feature losses: project, compare, and add up the gradients, chunk by chunk.

The projection and its difference to the other side exist for one chunk of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.autograd import Tensors
from ..core.backend import Backend
from ..core.matmul import (
    accum_dtype,
    add_weight_gradient,
    has_mixed_gemm,
    head_logits,
    hidden_gradient,
    logit_buffer,
)
from ..core.rows import equal_chunk, rows_in
from ..options import Distance, Project

# A CPU's chunk. Smaller ones slow the GEMMs down by more than they save in cache: 1024 rows of 768 take 0.93 of the time of 341
# (dev/LOG.md). At least as many rows as keep a GEMM with a wide head busy.
CPU_CHUNK_BYTES = 4 * 2**20
MIN_CPU_CHUNK_ROWS = 256


def _chunk_rows(backend: Backend, rows: int, width: int, device: torch.device) -> int:
    """How many rows are projected at a time, at least 1."""
    if device.type != "cpu":
        return backend.chunk_rows(max(rows, 1), width, None, device)
    return equal_chunk(rows, rows_in(2 * CPU_CHUNK_BYTES, max(width, 1), MIN_CPU_CHUNK_ROWS))


@dataclass(frozen=True)
class ProjectionDistance:
    """One layer pair of `projection_mse` or `cosine_loss`: tensors are student, teacher, weight, bias.

    Masked rows stay in the GEMMs: these are small, and finding the rows would be a host sync per layer.
    """

    backend: Backend
    project: Project
    distance: Distance
    autocast: torch.dtype | None
    fp16_bound: float | None

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row distances and the gradients of student, weight and bias."""
        student, teacher, head, bias = tensors
        assert student is not None and teacher is not None
        source, target = (student, teacher) if self.project == "student" else (teacher, student)
        wide = accum_dtype(student.dtype)
        if head is not None:
            head, source = (side.to(self.autocast or side.dtype) for side in (head, source))
            # A teacher in float64 beside a student that is not, or the other way round: the student's digits count.
            if accum_dtype(head.dtype) != wide:
                head, source = head.to(wide), source.to(wide)
        target = target if accum_dtype(target.dtype) == wide else target.to(wide)
        target = target if target.stride(-1) == 1 else target.contiguous()
        rows, width = target.shape
        values = torch.empty(rows, dtype=wide, device=student.device)

        needs_student, _, needs_head, needs_bias = needs[:4]
        d_student = torch.empty_like(student, dtype=wide) if needs_student else None
        allocate = torch.empty_like if rows else torch.zeros_like  # the first chunk writes, the others add
        d_head = allocate(head, dtype=wide) if needs_head and head is not None else None
        d_bias = torch.zeros(width, dtype=wide, device=student.device) if needs_bias else None
        size = _chunk_rows(self.backend, rows, width, student.device)
        buffer = logit_buffer(min(size, rows), width, student)
        half = head is not None and has_mixed_gemm(head)
        # Narrow numbers go into the memory of the projection they replace, as the GEMMs take them.
        narrow = buffer.view(head.dtype) if half and head is not None else buffer
        # Rows of weight 0 have a gradient of 0, but 0 * NaN would reach the projection. A CPU can look whether there are any.
        masked = None if weight is None else weight == 0
        if masked is not None and masked.device.type == "cpu" and not bool(masked.any()):
            masked = None
        for start in range(0, rows, size):
            here = slice(start, min(start + size, rows))
            prediction, grad = (side[: here.stop - start, :width] for side in (buffer, narrow))
            if head is None:
                prediction.copy_(source[here])
            else:
                head_logits(source[here], head, prediction)
            part = None if weight is None else weight[here]
            d_target = d_student[here] if d_student is not None and self.project == "teacher" else None
            values[here] = self._compare(
                prediction, target[here], bias, part, grad if any(needs) else None, d_target
            )
            if d_bias is not None:
                d_bias.add_(grad.sum(0, dtype=wide))
            if d_student is not None and self.project == "student":
                if head is None:
                    d_student[here] = grad
                else:
                    hidden_gradient(grad, head, d_student[here])
            if d_head is not None:
                kept = source[here]
                kept = kept if masked is None else kept.masked_fill(masked[here].unsqueeze(1), 0.0)
                add_weight_gradient(d_head, grad, kept, first=start == 0)
        return values, (d_student, None, d_head, d_bias)

    def _compare(
        self,
        prediction: Tensor,  # (R, D), overwritten
        target: Tensor,  # (R, D)
        bias: Tensor | None,
        weight: Tensor | None,  # (R,)
        # (R, D) receives the gradient: the prediction, or narrower numbers in its memory
        grad: Tensor | None,
        d_target: Tensor | None,  # (R, D) receives the gradient of the target
    ) -> Tensor:
        """(R,) distances of one chunk."""
        if self.distance != "squared":
            return self.backend.direction_rows(
                prediction,
                target,
                cosine=self.distance == "cosine",
                bias=bias,
                row_weight=weight,
                write_grad=grad is not None,
                grad=grad,
                grad_target=d_target,
            )
        if d_target is None or grad is None:
            return self.backend.mse_rows(
                prediction, target, bias=bias, row_weight=weight, write_grad=grad is not None, grad=grad
            )
        # The other side's gradient is the same numbers with the other sign; it takes them before they are rounded.
        values = self.backend.mse_rows(prediction, target, bias=bias, row_weight=weight)
        torch.neg(prediction, out=d_target)
        if grad.dtype != prediction.dtype:
            grad.copy_(prediction.to(grad.dtype))
        return values
