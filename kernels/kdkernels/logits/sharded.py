"""`linear_kd_loss(vocab_group=...)`: every rank holds a slice of the vocabulary, of both heads, and of no other rank's.

Hidden states and labels are the same on all ranks. A rank makes the logits of its own slice, the row work runs in the
three steps of `tile_state` with the slice as the only tile, and between the steps the ranks bring their states together:
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
    CE_SUM,
    FAR_MEAN,
    LABEL,
    LOGIT_SUM,
    MEAN,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_LABEL,
    TEACHER_MAX,
    TEACHER_SUM,
    VALUE,
    new_state,
)
from ..core.rows import compact_rows, put_back, zero_where_dead
from ..options import RowTerms
from . import tiles
from .teacher_rows import TeacherLogitSource, part, take

_MAXIMA, _THEIR_SUMS = [STUDENT_MAX, TEACHER_MAX, CE_MAX], [STUDENT_SUM, TEACHER_SUM, CE_SUM]
_SUMS = [*_THEIR_SUMS, LABEL, TEACHER_LABEL, LOGIT_SUM]
_SECOND_SUMS = [VALUE, MEAN, FAR_MEAN]


@dataclass(frozen=True)
class Shard:
    """One rank's slice of the vocabulary: columns [offset, offset + its own) of `total`."""

    group: dist.ProcessGroup
    offset: int
    total: int
    widest: int  # columns of the largest slice


# Sizes are exchanged once for a group and a size of ours: heads keep theirs, and a step should not wait for numbers.
_SHARDS: dict[tuple[dist.ProcessGroup, int], Shard] = {}


def shard_of(group: object, columns: int, device: torch.device) -> Shard:
    """This rank's slice of `columns` columns; ranks hold their slices in the order of their numbers."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"vocab_group must be a process group of torch.distributed, got {type(group).__name__}; "
            "pass torch.distributed.group.WORLD or what new_group returned"
        )
    key = (group, columns)
    if key not in _SHARDS:
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor([columns], device=device), group=group)
        numbers = [int(size) for size in sizes]
        _SHARDS[key] = Shard(group, sum(numbers[: group.rank()]), sum(numbers), max(numbers))
    return _SHARDS[key]


def _merge_statistics(state: Tensor, temperature: float, group: dist.ProcessGroup) -> None:
    """The first nine slots of the whole vocabulary from those of every slice."""
    mine = state[_MAXIMA]
    maxima = mine.clone()
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    # A slice of nothing but -inf has the sum 0, whatever its maximum stands for.
    reference = maxima.masked_fill(maxima == -torch.inf, 0.0)
    scale = maxima.new_tensor([1.0 / temperature, 1.0 / temperature, 1.0]).unsqueeze(1)
    state[_THEIR_SUMS] *= ((mine - reference) * scale).exp()
    state[_MAXIMA] = maxima
    _sum_over_ranks(state, _SUMS, group)


def _sum_over_ranks(state: Tensor, slots: list[int], group: dist.ProcessGroup) -> None:
    sums = state[slots]
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    state[slots] = sums


@dataclass(frozen=True)
class ShardedKD:
    """`autograd.Solver`; tensors are student hidden, weight, bias; teacher source, weight, bias; labels; the weights of
    `Decoupled`; None for an index map. Weights and biases are this rank's slices, as are stored teacher logits."""

    terms: RowTerms
    backend: Backend
    chunk_bytes: int | None
    autocast: torch.dtype | None
    half_bound: float | None
    shard: Shard
    compact: bool  # gather the rows that count first, which makes the host wait once

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses, the same on every rank, and the gradients of student hidden states, weight and bias."""
        hidden, head, bias, source, teacher_head, teacher_bias, labels, target, non_target, _ = tensors
        assert hidden is not None and head is not None and source is not None
        rows, columns, wide = hidden.shape[0], head.shape[0], wide_dtype(head.dtype)
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        index = compact_rows(weight, labels, self.shard.total) if self.compact else None
        hidden, labels, weight, target, non_target = (
            take(tensor, index) for tensor in (hidden, labels, weight, target, non_target)
        )
        assert hidden is not None
        counted = hidden.shape[0]
        values = torch.zeros(counted, dtype=wide, device=hidden.device)
        d_hidden, d_head, d_bias = (
            torch.zeros(shape, dtype=wide, device=head.device) if need else None
            for shape, need in zip((hidden.shape, head.shape, (columns,)), needs[:3], strict=True)
        )
        half = has_half_products(head)
        # By the widest slice: the ranks meet in each chunk, so all of them have to have the same.
        size = self.backend.chunk_rows(max(counted, 1), self.shard.widest, self.chunk_bytes, hidden.device)
        buffer = logit_buffer(min(size, counted), columns, head)
        teacher = TeacherLogitSource.prepare(source, teacher_head, self.autocast, index, buffer.shape[0])
        for start in range(0, counted, size):
            here = slice(start, min(start + size, counted))
            logits = buffer[: here.stop - start, :columns]
            head_logits(hidden[here], head, logits)
            grad = buffer.view(head.dtype)[: here.stop - start, :columns] if half else logits
            decoupled = None if target is None or non_target is None else (target[here], non_target[here])
            values[here] = self._rows(
                logits,
                teacher.logits(here),
                part(labels, here),
                bias,
                teacher_bias,
                decoupled,
                part(weight, here),
                grad if any(needs) else None,
            )
            if d_hidden is not None:
                hidden_gradient(grad, head, d_hidden[here])
            if d_head is not None:
                kept = zero_where_dead(hidden[here], part(weight, here))
                add_weight_gradient(d_head, grad, kept, first=False)
            if d_bias is not None:
                d_bias += grad.sum(0, dtype=wide)
        if d_hidden is not None:
            dist.all_reduce(d_hidden, dist.ReduceOp.SUM, self.shard.group)
            d_hidden = put_back(d_hidden, index, rows)
        return put_back(values, index, rows), (d_hidden, d_head, d_bias, *(None,) * 7)

    def _rows(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        decoupled: tuple[Tensor, Tensor] | None,
        row_weight: Tensor | None,
        grad: Tensor | None,
    ) -> Tensor:
        """(R,) row losses; `grad` receives the gradient of this rank's logits."""
        terms, backend, group = self.terms, self.backend, self.shard.group
        state = new_state(len(student), wide_dtype(student.dtype), student.device)
        arguments = (student, teacher, labels, terms, state)
        options: dict[str, Any] = {
            "offset": self.shard.offset,
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
            "row_weight": row_weight,
        }
        backend.tile_statistics(*arguments, **options)
        _merge_statistics(state, terms.temperature, group)
        backend.tile_sums(*arguments, **options)
        _sum_over_ranks(state, _SECOND_SUMS, group)
        if grad is not None:
            backend.tile_gradient(
                *arguments, vocabulary=self.shard.total, decoupled=decoupled, grad=grad, **options
            )
        kd, ce = tiles.finish(
            state, labels, terms, vocabulary=self.shard.total, decoupled=decoupled, row_weight=row_weight
        )
        return terms.loss(kd, ce)
