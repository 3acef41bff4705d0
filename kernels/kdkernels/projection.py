"""The token-chunk schedule of the feature losses: project, compare, and add up the gradients, chunk by chunk.

The projection and its difference to the other side exist for one chunk of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import Tensors
from .backends import Backend
from .matmul import add_weight_gradient, has_half_products, head_logits, hidden_gradient, wide_dtype
from .options import Distance, Project


@dataclass(frozen=True)
class ProjectionDistance:
    """One layer pair of `projection_mse` or `cosine_loss`: tensors are student, teacher, weight, bias.

    Rows that do not count stay in the products: these are small, and finding the rows would make the
    host wait for the device once per layer.
    """

    backend: Backend
    project: Project
    distance: Distance
    autocast: torch.dtype | None
    half_bound: float | None

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row distances and the gradients of student, weight and bias."""
        student, teacher, head, bias = tensors
        assert student is not None and teacher is not None
        source, target = (student, teacher) if self.project == "student" else (teacher, student)
        if head is not None:
            head, source = head.to(self.autocast or head.dtype), source.to(self.autocast or source.dtype)
        target = target if target.stride(-1) == 1 else target.contiguous()
        rows, width = target.shape
        wide = wide_dtype(student.dtype)
        values = torch.zeros(rows, dtype=wide, device=student.device)

        needs_student, _, needs_head, needs_bias = needs[:4]
        d_student = torch.empty_like(student, dtype=wide) if needs_student else None
        d_head = torch.zeros_like(head, dtype=wide) if needs_head and head is not None else None
        d_bias = torch.zeros(width, dtype=wide, device=student.device) if needs_bias else None
        size = self.backend.chunk_rows(max(rows, 1), width, None, student.device)
        buffer = torch.empty((min(size, rows), width), dtype=wide, device=student.device)
        for start in range(0, rows, size):
            here = slice(start, min(start + size, rows))
            prediction = buffer[: here.stop - start]
            if head is None:
                prediction.copy_(source[here])
            else:
                head_logits(source[here], head, prediction)
            part = None if weight is None else weight[here]
            d_target = d_student[here] if d_student is not None and self.project == "teacher" else None
            values[here] = self._compare(prediction, target[here], bias, part, any(needs), d_target)
            if d_bias is not None:
                d_bias.add_(prediction.sum(0))
            grad = prediction.to(head.dtype) if head is not None and has_half_products(head) else prediction
            if d_student is not None and self.project == "student":
                if head is None:
                    d_student[here] = prediction
                else:
                    hidden_gradient(grad, head, d_student[here])
            if d_head is not None:
                # Rows of weight 0 have a gradient of 0, but 0 * NaN would reach the projection.
                kept = source[here]
                kept = kept if part is None else kept.masked_fill((part == 0).unsqueeze(1), 0.0)
                add_weight_gradient(d_head, grad, kept, first=start == 0)
        return values, (d_student, None, d_head, d_bias)

    def _compare(
        self,
        prediction: Tensor,  # (R, D), becomes its gradient if `write_grad`
        target: Tensor,  # (R, D)
        bias: Tensor | None,
        weight: Tensor | None,  # (R,)
        write_grad: bool,
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
                write_grad=write_grad,
                grad_target=d_target,
            )
        values = self.backend.mse_rows(
            prediction, target, bias=bias, row_weight=weight, write_grad=write_grad
        )
        if d_target is not None:
            torch.neg(prediction, out=d_target)
        return values
