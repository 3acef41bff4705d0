"""The token-chunk schedule that both fast back ends share.

Each class holds the plain options of one loss and solves it chunk by chunk (`autograd.Solver`):
rows that count are gathered first, so the others cost no matrix product; logits exist for one chunk
of tokens at a time; the back end's row function turns the chunk of logits into its own gradient in
place; the products then add it to the gradients of hidden states and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Tensors
from ..core.backend import Backend
from ..core.matmul import (
    add_weight_gradient,
    has_half_products,
    head_logits,
    hidden_gradient,
    logit_buffer,
    wide_dtype,
)
from ..core.rows import compact_rows, put_back, zero_where_dead
from ..options import RowTerms
from ..teachers import Form, Tail
from .teacher_rows import CrossTermWork, RowOptions, RowTensors, part, row_work, take


def _gradient_view(buffer: Tensor, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """Where the gradient of the logits in `buffer` goes: the same memory, in the dtype the products take."""
    return buffer.view(dtype)[:, :vocabulary] if dtype != buffer.dtype else buffer[:, :vocabulary]


class RowResults:
    """Where the row functions' results of all rows are put together: losses, and statistics where they are wanted."""

    def __init__(self, rows: int, terms: RowTerms, stats: bool, like: Tensor) -> None:
        """`like` has the dtype that the loss is computed for and the device."""
        self.terms, self.with_stats = terms, stats
        # Losses; then the divergence, the cross entropy and the five numbers of `kd_rows`.
        wide = wide_dtype(like.dtype)
        self.table = torch.zeros((8 if stats else 1, rows), dtype=wide, device=like.device)

    def stats(self, rows: slice) -> Tensor | None:
        """(5, R) for the row function to write to."""
        return self.table[3:, rows] if self.with_stats else None

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
    """`linear_kd_loss`: tensors are student hidden, weight, bias; the teacher's three (`teachers.Form`); labels; the
    weights of `Decoupled`; the vocabulary's index map."""

    terms: RowTerms
    backend: Backend
    chunk_bytes: int | None
    autocast: torch.dtype | None
    half_bound: float | None
    form: Form = "full"
    tail: Tail = "renormalize"
    shared: int | None = None  # both vocabularies share their first ids; without a map
    stats: bool = False
    compact: bool = False  # gather the rows that count first, which makes the host wait once
    logit_dtype: torch.dtype | None = None  # of the buffers; None is float32

    @property
    def passed_on(self) -> int:
        """Numbers per row beside the loss: the divergence, the cross entropy and the five of `kd_rows`."""
        return 7 if self.stats else 0

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradients of student hidden states, weight and bias."""
        hidden, head, bias, *teacher, labels, target, non_target, vocab_map = tensors
        assert hidden is not None and head is not None
        rows, vocabulary = hidden.shape[0], head.shape[0]
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        index = compact_rows(weight, labels, vocabulary) if self.compact else None
        hidden = hidden if index is None else hidden.index_select(0, index)
        labels, weight = take(labels, index), take(weight, index)
        target, non_target = take(target, index), take(non_target, index)
        tensors_of_rows = RowTensors(bias, labels, weight, target, non_target, vocab_map)
        counted = hidden.shape[0]
        wide = wide_dtype(head.dtype)
        results = RowResults(counted, self.terms, self.stats, head)
        needs_hidden, needs_head, needs_bias = needs[:3]

        # In float32 until backward knows the upstream factor, so that every gradient is rounded once.
        half = has_half_products(head)
        d_hidden = torch.empty_like(hidden, dtype=wide) if needs_hidden else None
        allocate = torch.empty_like if counted else torch.zeros_like
        d_head = allocate(head, dtype=wide, memory_format=torch.contiguous_format) if needs_head else None
        d_bias = torch.zeros(vocabulary, dtype=wide, device=head.device) if needs_bias else None

        size = self.backend.chunk_rows(max(counted, 1), vocabulary, self.chunk_bytes, hidden.device)
        buffer = logit_buffer(min(size, counted), vocabulary, head, self.logit_dtype)
        gradient_dtype = self.logit_dtype or (head.dtype if half else wide)
        gradient = _gradient_view(buffer, gradient_dtype, vocabulary) if any(needs) else None
        options = RowOptions(
            self.terms,
            self.backend,
            self.form,
            self.tail,
            self.shared,
            self.stats,
            self.autocast,
            self.logit_dtype,
        )
        work = row_work(options, tuple(teacher), index, len(buffer), hidden, tensors_of_rows, results.stats)
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
                kept = hidden[here] if self.compact else zero_where_dead(hidden[here], part(weight, here))
                add_weight_gradient(d_head, grad, kept, first=start == 0)
            if d_bias is not None:
                d_bias.add_(grad.sum(0, dtype=wide))
        d_hidden = None if d_hidden is None else put_back(d_hidden, index, rows)
        return results.values(rows, index), (d_hidden, d_head, d_bias, *(None,) * 7)


@dataclass(frozen=True)
class LogitKD:
    """`kd_loss`: tensors are student logits; the teacher's three (`teachers.Form`); labels; the weights of
    `Decoupled`; the vocabulary's index map."""

    terms: RowTerms
    backend: Backend
    autocast: torch.dtype | None
    half_bound: float | None = None
    form: Form = "full"
    tail: Tail = "renormalize"
    shared: int | None = None
    stats: bool = False
    stored: bool = False  # the teacher is logits, which are the same numbers when the gradient is computed

    @property
    def passed_on(self) -> int:
        """Numbers per row beside the loss: the divergence, the cross entropy and the five of `kd_rows`."""
        return 7 if self.stats else 0

    @property
    def state_size(self) -> int:
        """Numbers per row that values keep for the gradient, which then takes one pass over both rows."""
        return self.backend.ROW_STATE if self.stored and self.terms.kd_scale != 0.0 else 0

    def values(self, tensors: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Row losses, and the state of the rows."""
        logits, teacher, options = self._rows(tensors, weight)
        results = RowResults(len(logits), self.terms, self.stats, logits)
        state = torch.empty(
            (self.backend.ROW_STATE, len(logits)), dtype=results.table.dtype, device=logits.device
        )
        every = slice(0, len(logits))
        kd, ce = self.backend.kd_rows(
            logits, teacher, tensors[4], self.terms, stats=results.stats(every), state=state, **options
        )
        results.put(every, kd, ce)
        return results.values(len(logits), None), state

    def gradients(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...], state: Tensor
    ) -> Tensors:
        """The gradient of the student logits."""
        logits, teacher, options = self._rows(tensors, weight)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self.backend.kd_gradient(logits, teacher, tensors[4], self.terms, state=state, grad=grad, **options)
        return grad, *(None,) * (len(tensors) - 1)

    def _rows(self, tensors: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Both sides' logits with a contiguous last axis, and what else the back end takes of stored teacher logits."""
        student, teacher, _, _, _, target, non_target, vocab_map = tensors
        assert student is not None and teacher is not None
        student, teacher = (
            side if side.stride(-1) == 1 else side.contiguous() for side in (student, teacher)
        )
        both = None if target is None or non_target is None else (target, non_target)
        vocabularies = self.shared if vocab_map is None else vocab_map
        return student, teacher, {"row_weight": weight, "vocab_map": vocabularies, "decoupled": both}

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradient of the student logits."""
        logits, *teacher, labels, target, non_target, vocab_map = tensors
        assert logits is not None
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        rows, vocabulary = logits.shape
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if needs[0] else None
        options = RowOptions(
            self.terms, self.backend, self.form, self.tail, self.shared, self.stats, self.autocast
        )
        # The work with labels only or with a top k overwrites its logits, and these are the caller's.
        overwritten = self.form == "top_k"
        if (
            self.terms.kd_scale == 0.0
        ):  # the gradient is that of the labels alone, whatever is counted beside it
            overwritten = not self.terms.student_transform.is_identity
        # Stored teacher logits need no buffer, so their rows are one chunk.
        size = max(rows, 1)
        if overwritten or (teacher[1] is not None and not options.labels_only):
            size = self.backend.chunk_rows(size, vocabulary, None, logits.device)
        results = RowResults(rows, self.terms, self.stats, logits)
        tensors_of_rows = RowTensors(None, labels, weight, target, non_target, vocab_map)
        work = row_work(options, tuple(teacher), None, min(size, rows), None, tensors_of_rows, results.stats)
        for start in range(0, rows, size):
            here = slice(start, min(start + size, rows))
            grad = None if d_logits is None else d_logits[here]
            source = logits[here]
            if overwritten:
                source = source.clone() if grad is None else grad.copy_(source)
            results.put(here, *work(source, here, grad))
        return results.values(rows, None), (d_logits, *(None,) * 7)
