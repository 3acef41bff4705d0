"""The token-chunk schedule that both fast back ends share.

Each class holds the plain options of one loss and solves it chunk by chunk (`autograd.Solver`):
rows that count are gathered first, so the others cost no matrix product; logits exist for one chunk
of tokens at a time; the back end's row function turns the chunk of logits into its own gradient in
place; the products then add it to the gradients of hidden states and head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import Tensors
from .backends import Backend
from .counting import compact_rows
from .matmul import add_weight_gradient, has_half_products, head_logits, hidden_gradient, wide_dtype
from .options import RowTerms


def _take(tensor: Tensor | None, index: Tensor | None) -> Tensor | None:
    """The rows named by `index`, all of them for None."""
    return tensor if tensor is None or index is None else tensor.index_select(0, index)


def _put(rows: int, index: Tensor | None, tensor: Tensor) -> Tensor:
    """Rows of a compacted tensor back at their places, zeros elsewhere."""
    if index is None:
        return tensor
    return tensor.new_zeros((rows, *tensor.shape[1:])).index_copy_(0, index, tensor)


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """`tensor` in the dtype autocast asks for, if it does."""
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def _logit_buffer(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """(rows, V) for logits of the head `like`; on GPUs rows start at multiples of 16 elements.

    The products take such rows as they are, in float32 and as their half alias, and Triton reads them 128 bits at a
    time only when it knows the stride to be a multiple of 16.
    """
    width = -(-vocabulary // 16) * 16 if like.device.type == "cuda" else vocabulary
    return torch.empty((rows, width), dtype=wide_dtype(like.dtype), device=like.device)


def _gradient_view(buffer: Tensor, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """Where the gradient of the logits in `buffer` goes: the same memory, in the dtype the products take."""
    return buffer.view(dtype)[:, :vocabulary] if dtype != buffer.dtype else buffer[:, :vocabulary]


def _row_weight_or_zero(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """Hidden rows of weight 0 become 0: their logit gradients are 0, but 0 * NaN would reach the head."""
    return hidden if weight is None else hidden.masked_fill((weight == 0).unsqueeze(1), 0.0)


def _both(target: Tensor | None, non_target: Tensor | None, rows: slice) -> tuple[Tensor, Tensor] | None:
    """The weights of `Decoupled` for some rows."""
    return None if target is None or non_target is None else (target[rows], non_target[rows])


def _row_loss(kd: Tensor, ce: Tensor, terms: RowTerms) -> Tensor:
    """(R,) the loss of each row from its two terms."""
    loss = kd * terms.kd_scale
    return loss if terms.ce_weight == 0.0 else loss.add_(ce, alpha=terms.ce_weight)


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
        self.table[0, rows] = _row_loss(kd, ce, self.terms)

    def values(self, rows: int, index: Tensor | None) -> Tensor:
        """(N,) or (8, N), rows of `index` back at their places."""
        table = self.table
        if index is not None:
            table = table.new_zeros((len(table), rows)).index_copy_(1, index, table)
        return table if self.with_stats else table[0]


@dataclass(frozen=True)
class TeacherSource:
    """Teacher logits chunk by chunk, from stored logits or from hidden states and a head."""

    source: Tensor  # (N, V) logits, rows in their original places, or (M, D_t) hidden states
    weight: Tensor | None
    index: Tensor | None  # places of the counted rows in stored logits
    buffer: Tensor | None

    @staticmethod
    def prepare(
        source: Tensor, weight: Tensor | None, dtype: torch.dtype | None, index: Tensor | None, chunk: int
    ) -> TeacherSource:
        """`dtype` is what autocast makes of hidden states and weight."""
        if weight is None:
            return TeacherSource(source, None, index, None)
        cast_weight, hidden = weight.to(dtype or weight.dtype), source.to(dtype or source.dtype)
        hidden = hidden if index is None else hidden.index_select(0, index)
        return TeacherSource(hidden, cast_weight, None, _logit_buffer(chunk, weight.shape[0], cast_weight))

    def logits(self, rows: slice) -> Tensor:
        """(R, V) with a contiguous last axis."""
        if self.weight is None or self.buffer is None:
            if self.index is not None:
                return self.source.index_select(0, self.index[rows])
            chunk = self.source[rows]
            return chunk if chunk.stride(-1) == 1 else chunk.contiguous()
        out = self.buffer[: rows.stop - rows.start, : self.weight.shape[0]]
        head_logits(self.source[rows], self.weight, out)
        return out


@dataclass(frozen=True)
class LinearKD:
    """`linear_kd_loss`: tensors are student hidden, weight, bias; teacher source, weight, bias; labels; the weights of
    `Decoupled`; the vocabulary's index map."""

    terms: RowTerms
    backend: Backend
    chunk_bytes: int | None
    autocast: torch.dtype | None
    half_bound: float | None
    shared: int | None = None  # both vocabularies share their first ids; without a map
    stats: bool = False
    compact: bool = False  # gather the rows that count first, which makes the host wait once

    @property
    def passed_on(self) -> int:
        """Numbers per row beside the loss: the divergence, the cross entropy and the five of `kd_rows`."""
        return 7 if self.stats else 0

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradients of student hidden states, weight and bias."""
        hidden, head, bias, teacher_source, teacher_head, teacher_bias, labels, *rest = tensors
        target, non_target, vocab_map = rest
        assert hidden is not None and head is not None and teacher_source is not None
        rows, vocabulary = hidden.shape[0], head.shape[0]
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        index = compact_rows(weight, labels, vocabulary) if self.compact else None
        hidden = hidden if index is None else hidden.index_select(0, index)
        labels, weight = _take(labels, index), _take(weight, index)
        target, non_target = _take(target, index), _take(non_target, index)
        counted = hidden.shape[0]
        wide = wide_dtype(head.dtype)
        results = RowResults(counted, self.terms, self.stats, head)
        needs_hidden, needs_head, needs_bias = needs[:3]

        # bfloat16 products are rounded once on their way out; float16 waits in float32 for its factor.
        half = has_half_products(head)
        hidden_dtype = head.dtype if half and self.half_bound is None else wide
        d_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if needs_hidden else None
        allocate = torch.empty_like if counted else torch.zeros_like
        d_head = allocate(head, dtype=wide, memory_format=torch.contiguous_format) if needs_head else None
        d_bias = torch.zeros(vocabulary, dtype=wide, device=head.device) if needs_bias else None

        size = self.backend.chunk_rows(max(counted, 1), vocabulary, self.chunk_bytes, hidden.device)
        buffer = _logit_buffer(min(size, counted), vocabulary, head)
        gradient = _gradient_view(buffer, head.dtype if half else wide, vocabulary) if any(needs) else None
        if self.shared is not None and teacher_head is not None and not self.stats:
            # What the student does not share takes no part, so it needs no product either.
            teacher_head = teacher_head[: self.shared]
            teacher_bias = None if teacher_bias is None else teacher_bias[: self.shared]
        teacher = TeacherSource.prepare(teacher_source, teacher_head, self.autocast, index, buffer.shape[0])
        for start in range(0, counted, size):
            here = slice(start, min(start + size, counted))
            chunk = here.stop - start
            logits = buffer[:chunk, :vocabulary]
            head_logits(hidden[here], head, logits)
            grad = None if gradient is None else gradient[:chunk]
            kd, ce = self.backend.kd_rows(
                logits,
                teacher.logits(here),
                None if labels is None else labels[here],
                self.terms,
                student_bias=bias,
                teacher_bias=teacher_bias,
                row_weight=None if weight is None else weight[here],
                grad=grad,
                vocab_map=self.shared if vocab_map is None else vocab_map,
                decoupled=_both(target, non_target, here),
                stats=results.stats(here),
            )
            results.put(here, kd, ce)
            if grad is None:
                continue
            if d_hidden is not None:
                hidden_gradient(grad, head, d_hidden[here])
            if d_head is not None:
                kept = _row_weight_or_zero(hidden[here], None if weight is None else weight[here])
                add_weight_gradient(d_head, grad, kept, first=start == 0)
            if d_bias is not None:
                d_bias.add_(grad.sum(0, dtype=wide))
        d_hidden = None if d_hidden is None else _put(rows, index, d_hidden)
        return results.values(rows, index), (d_hidden, d_head, d_bias, *(None,) * 7)


@dataclass(frozen=True)
class LogitKD:
    """`kd_loss`: tensors are student logits; teacher source, weight, bias; labels; the weights of `Decoupled`; the
    vocabulary's index map."""

    terms: RowTerms
    backend: Backend
    autocast: torch.dtype | None
    half_bound: float | None = None
    shared: int | None = None
    stats: bool = False

    @property
    def passed_on(self) -> int:
        """Numbers per row beside the loss: the divergence, the cross entropy and the five of `kd_rows`."""
        return 7 if self.stats else 0

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradient of the student logits."""
        logits, teacher_source, teacher_head, teacher_bias, labels, target, non_target, vocab_map = tensors
        assert logits is not None and teacher_source is not None
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        rows, vocabulary = logits.shape
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if needs[0] else None
        if self.shared is not None and teacher_head is not None and not self.stats:
            teacher_head = teacher_head[: self.shared]
            teacher_bias = None if teacher_bias is None else teacher_bias[: self.shared]
        # Stored teacher logits need no buffer, so their rows are one chunk.
        size = max(rows, 1)
        if teacher_head is not None:
            size = self.backend.chunk_rows(size, vocabulary, None, logits.device)
        teacher = TeacherSource.prepare(teacher_source, teacher_head, self.autocast, None, min(size, rows))
        results = RowResults(rows, self.terms, self.stats, logits)
        for start in range(0, rows, size):
            here = slice(start, min(start + size, rows))
            kd, ce = self.backend.kd_rows(
                logits[here],
                teacher.logits(here),
                None if labels is None else labels[here],
                self.terms,
                teacher_bias=teacher_bias,
                row_weight=None if weight is None else weight[here],
                grad=None if d_logits is None else d_logits[here],
                vocab_map=self.shared if vocab_map is None else vocab_map,
                decoupled=_both(target, non_target, here),
                stats=results.stats(here),
            )
            results.put(here, kd, ce)
        return results.values(rows, None), (d_logits, *(None,) * 7)
