"""The row work of a chunk with each form of teacher, or with labels only, over the counted rows.

A chunk's student logits lie in a buffer that may be overwritten; the work gives divergence and cross entropy of its rows and
writes the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.autograd import Tensors
from ..core.backend import Backend
from ..core.matmul import head_logits, logit_buffer, wide_dtype
from ..options import RowTerms
from ..teachers import Form, Tail
from .top_k import cross_term_rows, label_rows, top_k_rows

# Logits, which rows of all they are, and where their gradient goes > divergence and cross entropy.
RowWork = Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]]


def take(tensor: Tensor | None, index: Tensor | None) -> Tensor | None:
    """The rows named by `index`, all of them for None."""
    return tensor if tensor is None or index is None else tensor.index_select(0, index)


def part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows of a tensor that may be missing."""
    return None if tensor is None else tensor[rows]


@dataclass(frozen=True)
class TeacherLogitSource:
    """Teacher logits chunk by chunk, from stored logits or from hidden states and a head."""

    source: Tensor  # (N, V_t) logits, rows in their original places, or (M, D_t) hidden states
    weight: Tensor | None
    index: Tensor | None  # places of the counted rows in stored logits
    buffer: Tensor | None

    @staticmethod
    def prepare(
        source: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        index: Tensor | None,
        chunk: int,
        logit_dtype: torch.dtype | None = None,
    ) -> TeacherLogitSource:
        """`dtype` is what autocast makes of hidden states and weight."""
        if weight is None:
            return TeacherLogitSource(source, None, index, None)
        cast_weight, hidden = weight.to(dtype or weight.dtype), source.to(dtype or source.dtype)
        hidden = hidden if index is None else hidden.index_select(0, index)
        buffer = logit_buffer(chunk, weight.shape[0], cast_weight, logit_dtype)
        return TeacherLogitSource(hidden, cast_weight, None, buffer)

    def logits(self, rows: slice) -> Tensor:
        """(R, V_t) with a contiguous last axis."""
        if self.weight is None or self.buffer is None:
            if self.index is not None:
                return self.source.index_select(0, self.index[rows])
            chunk = self.source[rows]
            return chunk if chunk.stride(-1) == 1 else chunk.contiguous()
        out = self.buffer[: rows.stop - rows.start, : self.weight.shape[0]]
        head_logits(self.source[rows], self.weight, out)
        return out


@dataclass(frozen=True)
class RowOptions:
    """What the row work needs to know beside tensors."""

    terms: RowTerms
    backend: Backend
    form: Form
    tail: Tail
    shared: int | None  # both vocabularies share their first ids; without a map
    stats: bool
    autocast: torch.dtype | None
    logit_dtype: torch.dtype | None = None

    @property
    def labels_only(self) -> bool:
        """The work reads no teacher."""
        return not self.terms.reads_teacher(self.stats)


@dataclass(frozen=True)
class RowTensors:
    """The student's bias, and labels, weights and the rest of what has one entry per counted row."""

    bias: Tensor | None  # (V_s,)
    labels: Tensor | None
    weight: Tensor | None
    target: Tensor | None  # weights of `Decoupled`
    non_target: Tensor | None
    vocab_map: Tensor | None  # (V_s,)


def full_work(
    options: RowOptions,
    teacher: Tensors,
    index: Tensor | None,
    chunk: int,
    rows: RowTensors,
    stats: Callable[[slice], Tensor | None],
) -> RowWork:
    """With all of the teacher's logits."""
    source, head, bias = teacher
    assert source is not None
    if options.shared is not None and head is not None and not options.stats:
        # What the student does not share takes no part, so it needs no product either.
        head, bias = head[: options.shared], None if bias is None else bias[: options.shared]
    logits_of = TeacherLogitSource.prepare(source, head, options.autocast, index, chunk, options.logit_dtype)
    both = None if rows.target is None or rows.non_target is None else (rows.target, rows.non_target)

    # A divergence that only is a statistic may be infinite, and its gradient NaN even with a weight of 0.
    without_teacher = label_work(options, rows) if options.terms.kd_scale == 0.0 else None

    def work(logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        found = options.backend.kd_rows(
            logits,
            logits_of.logits(here),
            part(rows.labels, here),
            options.terms,
            student_bias=rows.bias,
            teacher_bias=bias,
            row_weight=part(rows.weight, here),
            grad=grad if without_teacher is None else None,
            vocab_map=options.shared if rows.vocab_map is None else rows.vocab_map,
            decoupled=None if both is None else (both[0][here], both[1][here]),
            stats=stats(here),
        )
        if without_teacher is not None and grad is not None:
            without_teacher(logits, here, grad)
        return found

    return work


def top_k_work(options: RowOptions, teacher: Tensors, index: Tensor | None, rows: RowTensors) -> RowWork:
    """With its kept entries."""
    logprobs, indices = take(teacher[0], index), take(teacher[1], index)
    assert logprobs is not None and indices is not None

    def work(logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        return top_k_rows(
            options.backend,
            logits,
            logprobs[here],
            indices[here],
            options.tail,
            part(rows.labels, here),
            options.terms,
            bias=rows.bias,
            row_weight=part(rows.weight, here),
            grad=grad,
        )

    return work


@dataclass(frozen=True)
class CrossTermWork:
    """With the cross-term: the rest of the hidden states' gradient is a multiple of it, `add_to_hidden`."""

    options: RowOptions
    cross: Tensor  # (M, D_s)
    mean: Tensor  # (M,) <p_t, logits> before the scale
    entropy: Tensor  # (M,)
    rows: RowTensors

    @staticmethod
    def prepare(
        options: RowOptions, teacher: Tensors, index: Tensor | None, hidden: Tensor, rows: RowTensors
    ) -> CrossTermWork:
        """`hidden` (M, D_s) are the counted rows."""
        cross, bias, entropy = (take(tensor, index) for tensor in teacher)
        assert cross is not None and bias is not None and entropy is not None
        wide = wide_dtype(hidden.dtype)
        cross = cross.to(wide)
        mean = torch.linalg.vecdot(hidden.to(wide), cross) + bias
        return CrossTermWork(options, cross, mean, entropy, rows)

    def __call__(self, logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        return cross_term_rows(
            self.options.backend,
            logits,
            self.mean[here],
            self.entropy[here],
            part(self.rows.labels, here),
            self.options.terms,
            bias=self.rows.bias,
            row_weight=part(self.rows.weight, here),
            grad=grad,
        )

    def add_to_hidden(self, d_hidden: Tensor, here: slice) -> None:
        """d_hidden (R, D_s) -= kd_scale / T * scale * weight * cross."""
        terms = self.options.terms
        factor = -terms.kd_scale / terms.temperature * terms.student_transform.scale
        cross = self.cross[here]
        if self.rows.weight is not None:
            weight = self.rows.weight[here].unsqueeze(1)
            # Rows that do not count may hold anything.
            cross = (cross * weight).masked_fill_(weight == 0, 0.0)
        d_hidden.add_(cross.to(d_hidden.dtype), alpha=factor)


def label_work(options: RowOptions, rows: RowTensors) -> RowWork:
    """Without a teacher."""

    def work(logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        return label_rows(
            options.backend,
            logits,
            part(rows.labels, here),
            options.terms,
            bias=rows.bias,
            row_weight=part(rows.weight, here),
            grad=grad,
        )

    return work


def row_work(
    options: RowOptions,
    teacher: Tensors,
    index: Tensor | None,
    chunk: int,
    hidden: Tensor | None,  # (M, D_s) the counted rows, for a cross-term
    rows: RowTensors,
    stats: Callable[[slice], Tensor | None],
) -> RowWork:
    """The work that the form of the teacher and the terms ask for."""
    if options.labels_only:
        return label_work(options, rows)
    if options.form == "full":
        return full_work(options, teacher, index, chunk, rows, stats)
    if options.form == "top_k":
        return top_k_work(options, teacher, index, rows)
    assert hidden is not None
    return CrossTermWork.prepare(options, teacher, index, hidden, rows)
