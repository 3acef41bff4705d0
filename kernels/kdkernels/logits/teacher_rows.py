"""The row work of a chunk with each form of teacher, or with labels only, over the valid rows.

The student logits of a chunk are in a buffer that may be overwritten; the work returns divergence and cross entropy of the rows
and writes the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.backend import Backend
from ..core.matmul import accum_dtype, head_logits, logit_buffer
from ..options import RowTerms
from ..reference.statistics import row_statistics
from ..teachers import CheckedTeacher, FullTeacher, TeacherCrossTerm, TeacherHead, TeacherTopK
from .inputs import Rows, index_rows, slice_rows
from .top_k import cross_term_rows, label_rows, top_k_rows

# Logits, which rows of all they are, and where their gradient goes > divergence and cross entropy.
RowFunction = Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TeacherLogitSource:
    """Teacher logits chunk by chunk, from stored logits or from hidden states and a head."""

    source: Tensor  # (N, V_t) logits, rows in their original places, or (M, D_t) hidden states
    weight: Tensor | None
    index: Tensor | None  # places of the counted rows in stored logits
    buffer: Tensor | None

    @staticmethod
    def prepare(
        teacher: FullTeacher,
        dtype: torch.dtype | None,
        index: Tensor | None,
        chunk: int,
        logit_dtype: torch.dtype | None = None,
    ) -> TeacherLogitSource:
        """`dtype` is what autocast makes of hidden states and weight."""
        if not isinstance(teacher, TeacherHead):
            return TeacherLogitSource(teacher.logits, None, index, None)
        weight, hidden = (tensor.to(dtype or tensor.dtype) for tensor in (teacher.weight, teacher.hidden))
        hidden = hidden if index is None else hidden.index_select(0, index)
        buffer = logit_buffer(chunk, weight.shape[0], weight, logit_dtype)
        return TeacherLogitSource(hidden, weight, None, buffer)

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
class RowCall:
    """What the row work of every chunk has in common."""

    terms: RowTerms
    backend: Backend
    rows: Rows  # the valid rows
    index: Tensor | None  # their places among all rows; None: all rows are valid
    vocab_map: int | Tensor | None
    stats: Callable[[slice], Tensor] | None  # where the statistics of some rows go
    bias: Tensor | None = None  # (V_s,) of the student's head
    autocast: torch.dtype | None = None
    logit_dtype: torch.dtype | None = None

    def work(
        self, teacher: CheckedTeacher, chunk: int, hidden: Tensor | None, reads_teacher: bool
    ) -> RowFunction:
        """The work that the teacher asks for; `hidden` (M, D_s) are the valid rows, for a cross-term."""
        if not reads_teacher:
            return self._with_labels
        if isinstance(teacher, TeacherTopK):
            return self._with_top_k(teacher)
        if isinstance(teacher, TeacherCrossTerm):
            assert hidden is not None
            return CrossTermWork.prepare(self, teacher, hidden)
        return self._with_logits(teacher, chunk)

    def _with_labels(self, logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = self.rows[here]
        return label_rows(
            self.backend, logits, rows.labels, self.terms, bias=self.bias, row_weight=rows.weight, grad=grad
        )

    def _with_logits(self, teacher: FullTeacher, chunk: int) -> RowFunction:
        bias = None
        if isinstance(teacher, TeacherHead):
            bias = teacher.bias
            if isinstance(self.vocab_map, int) and self.stats is None:
                # What the student does not share takes no part, so it needs no GEMM either.
                shared = slice(self.vocab_map)
                teacher, bias = replace(teacher, weight=teacher.weight[shared]), slice_rows(bias, shared)
        logits_of = TeacherLogitSource.prepare(teacher, self.autocast, self.index, chunk, self.logit_dtype)
        # A divergence that only is a statistic may be infinite, and its gradient NaN even with a weight of 0.
        only_labels = self.terms.kd_scale == 0.0

        def work(logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
            rows, teacher_logits = self.rows[here], logits_of.logits(here)
            if self.stats is not None:
                numbers = row_statistics(
                    logits, teacher_logits, rows.labels, rows.weight, self.terms, student_bias=self.bias,
                    teacher_bias=bias, vocab_map=self.vocab_map,
                )  # fmt: skip
                self.stats(here).copy_(numbers)
            found = self.backend.kd_rows(
                logits,
                teacher_logits,
                rows.labels,
                self.terms,
                student_bias=self.bias,
                teacher_bias=bias,
                row_weight=rows.weight,
                grad=None if only_labels else grad,
                vocab_map=self.vocab_map,
                decoupled=rows.decoupled,
            )
            if only_labels and grad is not None:
                self._with_labels(logits, here, grad)
            return found

        return work

    def _with_top_k(self, teacher: TeacherTopK) -> RowFunction:
        logprobs, indices = index_rows(teacher.logprobs, self.index), index_rows(teacher.indices, self.index)
        assert logprobs is not None and indices is not None

        def work(logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
            rows = self.rows[here]
            return top_k_rows(
                self.backend,
                logits,
                logprobs[here],
                indices[here],
                teacher.tail,
                rows.labels,
                self.terms,
                bias=self.bias,
                row_weight=rows.weight,
                grad=grad,
            )

        return work


@dataclass(frozen=True)
class CrossTermWork:
    """With the cross-term: the rest of the hidden states' gradient is a multiple of it, `add_to_hidden`."""

    call: RowCall
    cross: Tensor  # (M, D_s)
    mean: Tensor  # (M,) <p_t, logits> before the scale
    entropy: Tensor  # (M,)

    @staticmethod
    def prepare(call: RowCall, teacher: TeacherCrossTerm, hidden: Tensor) -> CrossTermWork:
        """`hidden` (M, D_s) are the valid rows."""
        cross, bias, entropy = (
            index_rows(tensor, call.index) for tensor in (teacher.cross, teacher.bias, teacher.entropy)
        )
        assert cross is not None and bias is not None and entropy is not None
        wide = accum_dtype(hidden.dtype)
        cross = cross.to(wide)
        return CrossTermWork(call, cross, torch.linalg.vecdot(hidden.to(wide), cross) + bias, entropy)

    def __call__(self, logits: Tensor, here: slice, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = self.call.rows[here]
        return cross_term_rows(
            self.call.backend,
            logits,
            self.mean[here],
            self.entropy[here],
            rows.labels,
            self.call.terms,
            bias=self.call.bias,
            row_weight=rows.weight,
            grad=grad,
        )

    def add_to_hidden(self, d_hidden: Tensor, here: slice) -> None:
        """d_hidden (R, D_s) -= kd_scale / T * scale * weight * cross."""
        terms, weight = self.call.terms, self.call.rows[here].weight
        factor = -terms.kd_scale / terms.temperature * terms.student_transform.scale
        cross = self.cross[here]
        if weight is not None:
            # Ignored rows may hold anything.
            cross = (cross * weight.unsqueeze(1)).masked_fill_(weight.unsqueeze(1) == 0, 0.0)
        d_hidden.add_(cross.to(d_hidden.dtype), alpha=factor)
