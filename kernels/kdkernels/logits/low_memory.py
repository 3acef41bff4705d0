"""`linear_kd_loss(mode="low_memory")`: logits of a few rows and a tile of the vocabulary at a time.

Every pass over the tiles makes their logits anew: one for the normalisers, one for sums that need them (not for forward KL
and Decoupled when there is a gradient to write), one for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Tensors
from ..core.backend import Backend
from ..core.matmul import (
    add_hidden_gradient,
    add_weight_gradient,
    has_half_products,
    head_logits,
    logit_buffer,
    wide_dtype,
)
from ..core.row_state import new_state
from ..core.rows import compact_rows, equal_chunk, put_back, zero_where_dead
from ..options import RowTerms
from ..teachers import TeacherHead, TeacherLogits
from . import tiles
from .inputs import Given, Rows, slice_rows

# Bytes of the two logit buffers together, and the rows of a tile: 8192 columns by default. On a GPU eight times as many: the
# row work of 64 MiB takes less time than its launches.
TILE_BYTES, GPU_TILE_BYTES = 1 << 26, 1 << 29
TILE_ROWS = 1024
# Fewer columns than this make thin products; then rows give way.
LEAST_COLUMNS = 1024
# Multiples of which rows and columns of a tile are: products on a device are cut into blocks, rows read 16 at a time.
ROW_STEP, COLUMN_STEP = 128, 16
# Columns that the least `chunk_bytes` has to hold of one row: below that a call is nothing but Python.
LEAST_TILE = 128


def tile_shape(rows: int, vocabulary: int, tile_bytes: int | None, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of two float32 buffers; chunks of rows, and tiles of a chunk, are of equal size."""
    default = TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    elements = (default if tile_bytes is None else tile_bytes) // 8
    most = max(1, min(TILE_ROWS, elements // min(LEAST_COLUMNS, vocabulary)))
    rows = equal_chunk(rows, most, ROW_STEP)
    return rows, equal_chunk(vocabulary, max(1, elements // rows), COLUMN_STEP)


@dataclass(frozen=True)
class _Chunk:
    """The counted rows of one chunk, and all of the heads."""

    hidden: Tensor  # (R, D_s)
    head: Tensor  # (V_s, D_s)
    bias: Tensor | None  # (V_s,)
    teacher: Tensor  # (R, D_t), or (R, V_t) logits
    teacher_head: Tensor | None  # (V_t, D_t)
    teacher_bias: Tensor | None  # (V_t,)
    shared: int  # columns below are the teacher's too
    columns: int  # of a tile
    buffers: tuple[Tensor, Tensor]

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None, dict[str, Any]]]:
        """Columns, student logits, teacher logits where there are some, and what goes with both to the back end."""
        vocabulary = self.head.shape[0]
        edges = [
            *range(0, self.shared, self.columns),
            *range(self.shared, vocabulary, self.columns),
            vocabulary,
        ]
        for start, stop in pairwise(edges):
            here = slice(start, stop)
            student = self.buffers[0][: len(self.hidden), : stop - start]
            head_logits(self.hidden, self.head[here], student)
            teacher: Tensor | None = None
            options: dict[str, Any] = {"offset": start, "student_bias": slice_rows(self.bias, here)}
            if start < self.shared:
                options["teacher_bias"] = slice_rows(self.teacher_bias, here)
                if self.teacher_head is None:
                    teacher = self.teacher[:, here]
                else:
                    teacher = self.buffers[1][: len(self.hidden), : stop - start]
                    head_logits(self.teacher, self.teacher_head[here], teacher)
            yield here, student, teacher, options


@dataclass(frozen=True)
class LowMemoryKD:
    """`autograd.Solver`; tensors are student hidden, weight, bias, and those of `Given`, without an index map."""

    terms: RowTerms
    backend: Backend
    tile_bytes: int | None
    autocast: torch.dtype | None
    half_bound: float | None
    layout: Given
    compact: bool = False  # gather the rows that count first, which makes the host wait once

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row losses and the gradients of student hidden states, weight and bias."""
        hidden, head, bias, *others = tensors
        given = self.layout.filled(tuple(others))
        teacher = given.teacher
        assert hidden is not None and head is not None and isinstance(teacher, TeacherLogits | TeacherHead)
        teacher_head = teacher_bias = None
        if isinstance(teacher, TeacherHead):
            source, teacher_head, teacher_bias = teacher.hidden, teacher.weight, teacher.bias
        else:
            source = teacher.logits
        rows, vocabulary = hidden.shape[0], head.shape[0]
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        if teacher_head is not None:
            source = source.to(self.autocast or source.dtype)
            teacher_head = teacher_head.to(self.autocast or teacher_head.dtype)
        index = compact_rows(weight, given.labels, vocabulary) if self.compact else None
        hidden = hidden if index is None else hidden.index_select(0, index)
        valid = given.rows(weight, index)
        shared = given.vocab_map if isinstance(given.vocab_map, int) else vocabulary
        if not self.terms.reads_teacher(stats=False):
            shared, valid = 0, replace(valid, decoupled=None)  # no tile has anything of the teacher
        wide, counted = wide_dtype(head.dtype), hidden.shape[0]
        values = torch.zeros(counted, dtype=wide, device=hidden.device)
        of_head = torch.empty if counted else torch.zeros  # the first chunk writes it, the others add
        gradients = [
            allocate(shape, dtype=wide, device=head.device) if need else None
            for allocate, shape, need in zip(
                (torch.zeros, of_head, torch.zeros),
                (hidden.shape, head.shape, (vocabulary,)),
                needs[:3],
                strict=True,
            )
        ]
        size, columns = tile_shape(max(counted, 1), vocabulary, self.tile_bytes, hidden.device)
        buffers = (
            logit_buffer(min(size, counted), columns, head),
            logit_buffer(min(size, counted), columns, head if teacher_head is None else teacher_head),
        )
        for start in range(0, counted, size):
            here = slice(start, min(start + size, counted))
            places = here if index is None else index[here]
            chunk = _Chunk(
                hidden[here],
                head,
                bias,
                source[places] if source.stride(-1) == 1 else source[places].contiguous(),
                teacher_head,
                teacher_bias,
                shared,
                columns,
                buffers,
            )
            values[here] = self._solve(chunk, valid[here], gradients, here)
        d_hidden = gradients[0]
        d_hidden = None if d_hidden is None else put_back(d_hidden, index, rows)
        return put_back(values, index, rows), (d_hidden, *gradients[1:], *(None,) * len(others))

    def _solve(
        self,
        chunk: _Chunk,
        rows: Rows,
        gradients: list[Tensor | None],
        here: slice,
    ) -> Tensor:
        """Row losses of a chunk; its gradients are added."""
        terms, backend, labels, weight = self.terms, self.backend, rows.labels, rows.weight
        state = new_state(len(chunk.hidden), wide_dtype(chunk.head.dtype), chunk.hidden.device)
        for _, student, teacher, options in chunk.tiles():
            backend.tile_statistics(student, teacher, labels, terms, state, row_weight=weight, **options)
        wanted = any(gradient is not None for gradient in gradients)
        summed = chunk.shared > 0 and (tiles.needs_sums_first(terms) or not wanted)
        if summed:
            for _, student, teacher, options in chunk.tiles():
                if teacher is not None:
                    backend.tile_sums(student, teacher, labels, terms, state, row_weight=weight, **options)
        if wanted:
            self._add_gradients(chunk, rows, state, summed, gradients, here)
        kd, ce = tiles.finish(
            state, labels, terms, vocabulary=len(chunk.head), decoupled=rows.decoupled, row_weight=weight
        )
        return terms.loss(kd, ce)

    def _add_gradients(
        self,
        chunk: _Chunk,
        rows: Rows,
        state: Tensor,
        summed: bool,
        gradients: list[Tensor | None],
        places: slice,
    ) -> None:
        d_hidden, d_head, d_bias = gradients
        half = has_half_products(chunk.head)
        kept = chunk.hidden if self.compact else zero_where_dead(chunk.hidden, rows.weight)
        for here, student, teacher, options in chunk.tiles():
            grad = student
            if half:
                # The narrower gradient lies in the memory of its own row, as in `kd_rows`.
                grad = chunk.buffers[0].view(chunk.head.dtype)[: len(student), : student.shape[1]]
            self.backend.tile_gradient(
                student,
                teacher,
                rows.labels,
                self.terms,
                state,
                vocabulary=len(chunk.head),
                row_weight=rows.weight,
                decoupled=rows.decoupled,
                grad=grad,
                add_value=not summed,
                **options,
            )
            if d_hidden is not None:
                add_hidden_gradient(d_hidden[places], grad, chunk.head[here])
            if d_head is not None:
                add_weight_gradient(d_head[here], grad, kept, first=places.start == 0)
            if d_bias is not None:
                d_bias[here] += grad.sum(0, dtype=d_bias.dtype)
