"""`linear_kd_loss(vocab_group=...)`: every rank holds a slice of the vocabulary, of both heads, and of no other rank's.

Hidden states and labels are the same on all ranks. A rank makes the logits of its own slice, the row work runs in the
three steps of `row_state` with the slice as the only tile, and between the steps the ranks bring their states together:
one maximum and two sums of a few numbers per row. What goes back to the hidden states is summed over the ranks, so
every rank has the loss and the gradient that one process with the whole vocabulary would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
from ..core.row_state import (
    CE_MAX,
    LOGIT_SUM,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    VALUE,
    new_state,
    rescale,
)
from ..core.rows import compact_rows, equal_chunk, put_back, zero_where_dead
from ..options import RowTerms
from ..teachers import TeacherHead, TeacherLogits
from . import tiles
from .inputs import Given, Rows
from .teacher_rows import TeacherLogitSource

# Slots by what the ranks do with them. Slices, as a list of slots would be copied from the host, which then waits.
_MAXIMA = slice(STUDENT_MAX, STUDENT_SUM)
_SUMS, _SECOND_SUMS = slice(STUDENT_SUM, LOGIT_SUM + 1), slice(VALUE, None)


@dataclass(frozen=True)
class Shard:
    """One rank's slice of the vocabulary: columns [offset, offset + its own) of `total`."""

    group: dist.ProcessGroup
    offset: int
    total: int
    chunk_rows: int  # rows of a chunk, the same on every rank, since the ranks meet in each chunk


def shard_of(group: object, rows: int, columns: int, chunk_rows: int, device: torch.device) -> Shard:
    """This rank's slice of `columns` columns; ranks hold their slices in the order of their numbers.

    The ranks exchange their sizes in every call. A memory of earlier calls would save this one host sync, but a rank that
    remembers a size beside one that does not would leave that one waiting for ever.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"vocab_group must be a process group of torch.distributed, got {type(group).__name__}; "
            "pass torch.distributed.group.WORLD or what new_group returned"
        )
    mine = torch.tensor([rows, columns, chunk_rows], device=device)
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group)
    every_rows, every_columns, every_chunk = torch.stack(sizes, 1).tolist()
    if len(set(every_rows)) != 1:
        raise ValueError(
            f"the ranks of vocab_group must have the same rows, got {every_rows} rows on ranks 0 to "
            f"{group.size() - 1}; pass the same student_hidden and labels on all of them"
        )
    return Shard(group, sum(every_columns[: group.rank()]), sum(every_columns), min(every_chunk))


def _merge_statistics(state: Tensor, temperature: float, group: dist.ProcessGroup) -> None:
    """The first nine slots of the whole vocabulary from those of every slice."""
    maxima = state[_MAXIMA].clone()
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    for largest, of_exponent in ((STUDENT_MAX, temperature), (TEACHER_MAX, temperature), (CE_MAX, 1.0)):
        total = state[largest + STUDENT_SUM]
        total.copy_(rescale(total, state[largest], maxima[largest], of_exponent))
    state[_MAXIMA] = maxima
    dist.all_reduce(state[_SUMS], dist.ReduceOp.SUM, group)


@dataclass(frozen=True)
class ShardedKD:
    """`autograd.Solver`; tensors are student hidden, weight, bias, and those of `Given`, without a map. Weights, biases and
    stored teacher logits are this rank's shards."""

    terms: RowTerms
    backend: Backend
    autocast: torch.dtype | None
    half_bound: float | None
    layout: Given
    shard: Shard
    compact: bool  # gather the rows that count first, which makes the host wait once

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses, the same on every rank, and the gradients of student hidden states, weight and bias."""
        hidden, head, bias, *others = tensors
        given = self.layout.filled(tuple(others))
        teacher = given.teacher
        assert hidden is not None and head is not None and isinstance(teacher, TeacherLogits | TeacherHead)
        rows, columns, wide = hidden.shape[0], head.shape[0], wide_dtype(head.dtype)
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        index = compact_rows(weight, given.labels, self.shard.total) if self.compact else None
        hidden = hidden if index is None else hidden.index_select(0, index)
        valid = given.rows(weight, index)
        counted = hidden.shape[0]
        values = torch.zeros(counted, dtype=wide, device=hidden.device)
        allocate = (
            torch.empty if counted else torch.zeros
        )  # the first chunk writes the head's, the others add
        d_hidden = allocate(hidden.shape, dtype=wide, device=head.device) if needs[0] else None
        d_head = allocate(head.shape, dtype=wide, device=head.device) if needs[1] else None
        d_bias = torch.zeros(columns, dtype=wide, device=head.device) if needs[2] else None
        half = has_half_products(head)
        size = equal_chunk(max(counted, 1), self.shard.chunk_rows)
        buffer = logit_buffer(min(size, counted), columns, head)
        teacher_bias = teacher.bias if isinstance(teacher, TeacherHead) else None
        logits_of = TeacherLogitSource.prepare(teacher, self.autocast, index, buffer.shape[0])
        for start in range(0, counted, size):
            here = slice(start, min(start + size, counted))
            logits = buffer[: here.stop - start, :columns]
            head_logits(hidden[here], head, logits)
            grad = buffer.view(head.dtype)[: here.stop - start, :columns] if half else logits
            values[here] = self._rows(
                logits, logits_of.logits(here), valid[here], bias, teacher_bias, grad if any(needs) else None
            )
            if d_hidden is not None:
                hidden_gradient(grad, head, d_hidden[here])
            if d_head is not None:
                kept = hidden[here] if self.compact else zero_where_dead(hidden[here], valid[here].weight)
                add_weight_gradient(d_head, grad, kept, first=start == 0)
            if d_bias is not None:
                d_bias += grad.sum(0, dtype=wide)
        if d_hidden is not None:
            dist.all_reduce(d_hidden, dist.ReduceOp.SUM, self.shard.group)
            d_hidden = put_back(d_hidden, index, rows)
        return put_back(values, index, rows), (d_hidden, d_head, d_bias, *(None,) * len(others))

    def _rows(
        self,
        student: Tensor,
        teacher: Tensor,
        rows: Rows,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        grad: Tensor | None,
    ) -> Tensor:
        """(R,) row losses; `grad` receives the gradient of this rank's logits."""
        terms, backend, group = self.terms, self.backend, self.shard.group
        state = new_state(len(student), wide_dtype(student.dtype), student.device)
        arguments = (student, teacher, rows.labels, terms, state)
        options: dict[str, Any] = {
            "offset": self.shard.offset,
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
            "row_weight": rows.weight,
        }
        backend.tile_statistics(*arguments, **options)
        _merge_statistics(state, terms.temperature, group)
        summed = grad is None or tiles.needs_sums_first(terms)
        if summed:
            backend.tile_sums(*arguments, **options)
            dist.all_reduce(state[_SECOND_SUMS], dist.ReduceOp.SUM, group)
        if grad is not None:
            backend.tile_gradient(
                *arguments,
                vocabulary=self.shard.total,
                decoupled=rows.decoupled,
                grad=grad,
                add_value=not summed,
                **options,
            )
        if not summed:
            dist.all_reduce(state[VALUE], dist.ReduceOp.SUM, group)
        kd, ce = tiles.finish(
            state,
            rows.labels,
            terms,
            vocabulary=self.shard.total,
            decoupled=rows.decoupled,
            row_weight=rows.weight,
        )
        return terms.loss(kd, ce)
