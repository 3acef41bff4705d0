"""The token-chunk schedule that both fast back ends share.

Each class holds the plain options of one loss and solves it chunk by chunk (`autograd.Solver`):
valid rows are gathered first, so masked ones cost no GEMM; logits exist for one chunk
of tokens at a time; the back end's row function turns the chunk of logits into its own gradient in
place; the GEMMs then add it to the gradients of hidden states and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from ..core.rows import compact_rows, put_back, zero_masked_rows
from ..options import RowTerms
from ..reference.statistics import row_statistics
from ..teachers import TeacherHead, TeacherLogits, TeacherTopK
from .inputs import Given
from .teacher_rows import CrossTermWork, RowCall


def _gradient_view(buffer: Tensor, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """Where the gradient of the logits in `buffer` goes: the same memory, in the dtype the GEMMs take."""
    return buffer.view(dtype)[:, :vocabulary] if dtype != buffer.dtype else buffer[:, :vocabulary]


class RowResults:
    """Accumulates row losses, and optional statistics, across chunks."""

    def __init__(self, rows: int, terms: RowTerms, stats: bool, like: Tensor) -> None:
        """`like` has the dtype that the loss is computed for and the device."""
        self.terms, self.with_stats = terms, stats
        # Losses; then the divergence, the cross entropy and the five of `reference.statistics`.
        wide = accum_dtype(like.dtype)
        self.table = torch.zeros((8 if stats else 1, rows), dtype=wide, device=like.device)

    def stats(self, rows: slice) -> Tensor:
        """(5, R) to be written to."""
        return self.table[3:, rows]

    def put(self, rows: slice, kd: Tensor, ce: Tensor) -> None:
        """Losses of some rows from their two terms."""
        if self.with_stats:
            self.table[1, rows], self.table[2, rows] = kd, ce
        self.table[0, rows] = self.terms.loss(kd, ce)

    def values(self, rows: int, index: Tensor | None) -> Tensor:
        """(N,) or (8, N), rows of `index` back at their places."""
        table = self.table
        if index is not None:
            table = table.new_zeros((len(table), rows)).index_copy_(1, index, table)
        return table if self.with_stats else table[0]


@dataclass(frozen=True)
class LinearKD:
    """`linear_kd_loss`: tensors are student hidden, weight, bias, and those of `Given`."""

    terms: RowTerms
    backend: Backend
    chunk_bytes: int | None
    autocast: torch.dtype | None
    fp16_bound: float | None
    layout: Given
    stats: bool = False
    compact: bool = False  # gather the valid rows first, a host sync
    logit_dtype: torch.dtype | None = None  # of the buffers; None is float32

    @property
    def aux_outputs(self) -> int:
        """Numbers per row beside the loss: the divergence, the cross entropy and five of `reference.statistics`."""
        return 7 if self.stats else 0

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradients of student hidden states, weight and bias."""
        hidden, head, bias, *others = tensors
        assert hidden is not None and head is not None
        given = self.layout.filled(tuple(others))
        rows, vocabulary = hidden.shape[0], head.shape[0]
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        index = compact_rows(weight, given.labels, vocabulary) if self.compact else None
        hidden = hidden if index is None else hidden.index_select(0, index)
        valid = given.rows(weight, index)
        counted = hidden.shape[0]
        wide = accum_dtype(head.dtype)
        results = RowResults(counted, self.terms, self.stats, head)
        needs_hidden, needs_head, needs_bias = needs[:3]

        # In float32 until backward knows the upstream factor, so that every gradient is rounded once.
        half = has_mixed_gemm(head)
        d_hidden = torch.empty_like(hidden, dtype=wide) if needs_hidden else None
        allocate = torch.empty_like if counted else torch.zeros_like
        d_head = allocate(head, dtype=wide, memory_format=torch.contiguous_format) if needs_head else None
        d_bias = torch.zeros(vocabulary, dtype=wide, device=head.device) if needs_bias else None

        size = self.backend.chunk_rows(max(counted, 1), vocabulary, self.chunk_bytes, hidden.device)
        buffer = logit_buffer(min(size, counted), vocabulary, head, self.logit_dtype)
        gradient_dtype = self.logit_dtype or (head.dtype if half else wide)
        gradient = _gradient_view(buffer, gradient_dtype, vocabulary) if any(needs) else None
        call = RowCall(
            self.terms,
            self.backend,
            valid,
            index,
            given.vocab_map,
            results.stats if self.stats else None,
            bias,
            self.autocast,
            self.logit_dtype,
        )
        work = call.work(given.teacher, len(buffer), hidden, self.terms.reads_teacher(self.stats))
        for start in range(0, counted, size):
            here = slice(start, min(start + size, counted))
            chunk = here.stop - start
            logits = buffer[:chunk, :vocabulary]
            head_logits(hidden[here], head, logits)
            grad = None if gradient is None else gradient[:chunk]
            kd, ce = work(logits, here, grad)
            results.put(here, kd, ce)
            if grad is None:
                continue
            if d_hidden is not None:
                hidden_gradient(grad, head, d_hidden[here])
                if isinstance(work, CrossTermWork):
                    work.add_to_hidden(d_hidden[here], here)
            if d_head is not None:
                kept = hidden[here] if self.compact else zero_masked_rows(hidden[here], valid[here].weight)
                add_weight_gradient(d_head, grad, kept, first=start == 0)
            if d_bias is not None:
                d_bias.add_(grad.sum(0, dtype=wide))
        d_hidden = None if d_hidden is None else put_back(d_hidden, index, rows)
        return results.values(rows, index), (d_hidden, d_head, d_bias, *(None,) * len(others))


@dataclass(frozen=True)
class LogitKD:
    """`kd_loss`: tensors are student logits, and those of `Given`."""

    terms: RowTerms
    backend: Backend
    autocast: torch.dtype | None
    fp16_bound: float | None
    layout: Given
    stats: bool = False

    @property
    def aux_outputs(self) -> int:
        """Numbers per row beside the loss: the divergence, the cross entropy and five of `reference.statistics`."""
        return 7 if self.stats else 0

    @property
    def state_size(self) -> int:
        """Numbers per row that values keep for the gradient, which then takes one pass over both rows."""
        # The numbers of stored logits are the same when the gradient is computed.
        stored = isinstance(self.layout.teacher, TeacherLogits)
        return self.backend.ROW_STATE if stored and self.terms.kd_scale != 0.0 else 0

    def values(self, tensors: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Row losses, and the state of the rows."""
        logits, teacher, labels, options = self._rows(tensors, weight)
        results = RowResults(len(logits), self.terms, self.stats, logits)
        state = torch.empty(
            (self.backend.ROW_STATE, len(logits)), dtype=results.table.dtype, device=logits.device
        )
        every = slice(0, len(logits))
        if self.stats:
            results.stats(every).copy_(
                row_statistics(logits, teacher, labels, weight, self.terms, vocab_map=options["vocab_map"])
            )
        kd, ce = self.backend.kd_rows(logits, teacher, labels, self.terms, state=state, **options)
        results.put(every, kd, ce)
        return results.values(len(logits), None), state

    def gradients(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...], state: Tensor
    ) -> Tensors:
        """The gradient of the student logits."""
        logits, teacher, labels, options = self._rows(tensors, weight)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self.backend.kd_gradient(logits, teacher, labels, self.terms, state=state, grad=grad, **options)
        return grad, *(None,) * (len(tensors) - 1)

    def _rows(
        self, tensors: Tensors, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        """Both sides' logits with a contiguous last axis, labels, and what else the back end takes."""
        given = self.layout.filled(tensors[1:])
        assert tensors[0] is not None and isinstance(given.teacher, TeacherLogits)
        student, teacher = (
            side if side.stride(-1) == 1 else side.contiguous() for side in (tensors[0], given.teacher.logits)
        )
        options = {"row_weight": weight, "vocab_map": given.vocab_map, "decoupled": given.decoupled}
        return student, teacher, given.labels, options

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradient of the student logits."""
        logits, *others = tensors
        assert logits is not None
        given = self.layout.filled(tuple(others))
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        rows, vocabulary = logits.shape
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if needs[0] else None
        # The work with labels only or with a top k overwrites its logits, and these are the caller's.
        overwritten = isinstance(given.teacher, TeacherTopK)
        if self.terms.kd_scale == 0.0:  # the gradient is that of the labels alone, also beside statistics
            overwritten = not self.terms.student_transform.is_identity
        reads_teacher = self.terms.reads_teacher(self.stats)
        # Stored teacher logits need no buffer, so their rows are one chunk.
        size = max(rows, 1)
        if overwritten or (isinstance(given.teacher, TeacherHead | TeacherTopK) and reads_teacher):
            size = self.backend.chunk_rows(size, vocabulary, None, logits.device)
        results = RowResults(rows, self.terms, self.stats, logits)
        call = RowCall(
            self.terms,
            self.backend,
            given.rows(weight, None),
            None,
            given.vocab_map,
            results.stats if self.stats else None,
            autocast=self.autocast,
        )
        work = call.work(given.teacher, min(size, rows), None, reads_teacher)
        for start in range(0, rows, size):
            here = slice(start, min(start + size, rows))
            grad = None if d_logits is None else d_logits[here]
            source = logits[here]
            if overwritten:
                source = source.clone() if grad is None else grad.copy_(source)
            results.put(here, *work(source, here, grad))
        return results.values(rows, None), (d_logits, *(None,) * len(others))
