"""The vocabulary schedule: logits of some rows and a tile of the vocabulary at a time.

Two callers share it. `mode="low_memory"` cuts the vocabulary of one process into small tiles, and every pass over them makes
their logits again. `vocab_group=...` has one tile per rank, its shard, and the ranks merge the states of their rows
between the passes (`sharded.py`). The passes: normalisers; sums, for divergences that need their mean or without a gradient to
write; gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..core.autograd import Tensors
from ..core.backend import Backend
from ..core.labels import BinaryKL, cross_entropy
from ..core.matmul import (
    accum_dtype,
    add_weight_gradient,
    has_mixed_gemm,
    head_logits,
    hidden_gradient,
    logit_buffer,
)
from ..core.row_state import CE_MAX, CE_SUM, LABEL, LOGIT_SUM, VALUE, Tile, new_state
from ..core.rows import compact_rows, equal_chunk, ids_in_range, put_back, zero_masked_rows
from ..options import RowTerms
from ..teachers import TeacherHead, TeacherLogits
from .inputs import Given, Rows, slice_rows
from .sharded import Shard

# Bytes of the two logit buffers together, and the rows of a tile: 8192 columns by default. On a GPU eight times as many: the
# row work of 64 MiB takes less time than its launches.
TILE_BYTES, GPU_TILE_BYTES = 1 << 26, 1 << 29
TILE_ROWS = 1024
# Fewer columns than this make thin GEMMs; then rows give way.
MIN_COLUMNS = 1024
# Multiples of which rows and columns of a tile are: GEMMs on a device are cut into blocks, rows read 16 at a time.
ROW_STEP, COLUMN_STEP = 128, 16
# Columns that the least `chunk_bytes` has to hold of one row: below that a call is nothing but Python.
MIN_TILE = 128


def tile_shape(rows: int, vocabulary: int, tile_bytes: int | None, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of two float32 buffers; chunks of rows, and tiles of a chunk, are of equal size."""
    default = TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    elements = (default if tile_bytes is None else tile_bytes) // 8
    most = max(1, min(TILE_ROWS, elements // min(MIN_COLUMNS, vocabulary)))
    rows = equal_chunk(rows, most, ROW_STEP)
    return rows, equal_chunk(vocabulary, max(1, elements // rows), COLUMN_STEP)


def row_values(state: Tensor, rows: Rows, terms: RowTerms, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,) of rows whose tiles have all been seen in every pass."""
    kd, ce = state[VALUE].clone(), torch.zeros_like(state[VALUE])
    if rows.decoupled is not None:
        of_target = BinaryKL.of_state(state, terms.temperature).divergence()
        kd = (rows.decoupled[0] * of_target + rows.decoupled[1] * kd).to(state.dtype)
    if rows.labels is not None and terms.ce_weight != 0.0:
        # Differences of logits first: they are small where the logits are large.
        mean = None if terms.label_smoothing == 0.0 else state[LOGIT_SUM] / vocabulary - state[CE_MAX]
        ce = cross_entropy(state[CE_SUM].log(), state[LABEL] - state[CE_MAX], mean, terms.label_smoothing)
    if rows.weight is not None:
        no_id = rows.weight.isnan()
        kd, ce = kd.masked_fill(no_id, math.nan), ce.masked_fill(no_id, math.nan)
        kd, ce = kd.masked_fill(rows.weight == 0, 0.0), ce.masked_fill(rows.weight == 0, 0.0)
    return kd, ce


@dataclass(frozen=True)
class _Chunk:
    """The valid rows of one chunk, and all of the heads that this process has."""

    hidden: Tensor  # (R, D_s)
    head: Tensor  # (V_s, D_s)
    bias: Tensor | None  # (V_s,)
    teacher: Tensor  # (R, D_t), or (R, V_t) logits
    teacher_head: Tensor | None  # (V_t, D_t)
    teacher_bias: Tensor | None  # (V_t,)
    rows: Rows
    shared: int  # columns below are also the teacher's
    columns: int  # of a tile
    offset: int  # id of the first column
    buffers: tuple[Tensor, Tensor | None]

    def tiles(self, again: bool = False) -> Iterator[tuple[slice, Tile]]:
        """Columns and their logits; `again`: in a later pass, a single tile still has them in its buffers."""
        vocabulary = self.head.shape[0]
        starts = [*range(0, self.shared, self.columns), *range(self.shared, vocabulary, self.columns)]
        kept = again and len(starts) == 1
        for start, stop in pairwise([*starts, vocabulary]):
            here = slice(start, stop)
            student = self.buffers[0][: len(self.hidden), : stop - start]
            if not kept:
                head_logits(self.hidden, self.head[here], student)
            teacher = teacher_bias = None
            if start < self.shared:
                teacher_bias = slice_rows(self.teacher_bias, here)
                if self.teacher_head is None or self.buffers[1] is None:
                    teacher = self.teacher[:, here]
                else:
                    teacher = self.buffers[1][: len(self.hidden), : stop - start]
                    if not kept:
                        head_logits(self.teacher, self.teacher_head[here], teacher)
            yield (
                here,
                Tile(
                    student,
                    teacher,
                    self.rows.labels,
                    self.offset + start,
                    slice_rows(self.bias, here),
                    teacher_bias,
                    self.rows.weight,
                ),
            )


@dataclass(frozen=True)
class TiledKD:
    """`autograd.Solver`; tensors are student hidden, weight, bias, and those of `Given`, without an index map. With a shard,
    weights, biases and stored teacher logits are those of this rank."""

    terms: RowTerms
    backend: Backend
    tile_bytes: int | None
    autocast: torch.dtype | None
    fp16_bound: float | None
    layout: Given
    compact: bool = False  # gather the valid rows first, a host sync
    shard: Shard | None = None

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
            source, teacher_head, teacher_bias = (
                teacher.hidden.to(self.autocast or teacher.hidden.dtype),
                teacher.weight.to(self.autocast or teacher.weight.dtype),
                teacher.bias,
            )
        else:
            source = teacher.logits
        rows, vocabulary = hidden.shape[0], head.shape[0]
        hidden, head = hidden.to(self.autocast or hidden.dtype), head.to(self.autocast or head.dtype)
        index = compact_rows(weight, given.labels, self._total(vocabulary)) if self.compact else None
        hidden = hidden if index is None else hidden.index_select(0, index)
        valid = self._nan_where_no_id(given.rows(weight, index), self._total(vocabulary))
        shared = given.vocab_map if isinstance(given.vocab_map, int) else vocabulary
        if not self.terms.reads_teacher(stats=False):
            shared, valid = 0, replace(valid, decoupled=None)  # no tile has anything of the teacher
        wide, counted = accum_dtype(head.dtype), hidden.shape[0]
        values = torch.zeros(counted, dtype=wide, device=hidden.device)
        of_head = torch.empty if counted else torch.zeros  # the first chunk writes it, the others add
        gradients = [
            allocate(shape, dtype=wide, device=head.device) if need else None
            for allocate, shape, need in zip(
                (torch.empty, of_head, torch.zeros),
                (hidden.shape, head.shape, (vocabulary,)),
                needs[:3],
                strict=True,
            )
        ]
        size, columns = self._sizes(max(counted, 1), vocabulary, hidden.device)
        held = min(size, counted)
        buffers = (
            logit_buffer(held, columns, head),
            None if teacher_head is None else logit_buffer(held, columns, teacher_head),
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
                valid[here],
                shared,
                columns,
                0 if self.shard is None else self.shard.offset,
                buffers,
            )
            values[here] = self._solve(chunk, gradients, here)
        d_hidden = gradients[0]
        if d_hidden is not None:
            if self.shard is not None:
                self.shard.add(d_hidden)
            d_hidden = put_back(d_hidden, index, rows)
        return put_back(values, index, rows), (d_hidden, *gradients[1:], *(None,) * len(others))

    def _nan_where_no_id(self, rows: Rows, vocabulary: int) -> Rows:
        """The rows, with a weight of NaN where a label that is used is no id; gathering the rows has refused those."""
        reads_label = self.terms.ce_weight != 0.0 or rows.decoupled is not None
        if self.compact or rows.labels is None or rows.weight is None or not reads_label:
            return rows
        _, outside = ids_in_range(rows.labels, vocabulary)
        return replace(rows, weight=rows.weight.masked_fill(outside & (rows.weight != 0), math.nan))

    def _total(self, vocabulary: int) -> int:
        """Columns of the whole vocabulary, of which this process has so many."""
        return vocabulary if self.shard is None else self.shard.total

    def _sizes(self, rows: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
        """Rows of a chunk and columns of a tile."""
        if self.shard is None:
            return tile_shape(rows, vocabulary, self.tile_bytes, device)
        return equal_chunk(rows, self.shard.chunk_rows), vocabulary

    def _solve(self, chunk: _Chunk, gradients: list[Tensor | None], here: slice) -> Tensor:
        """Row losses of a chunk; its gradients are added."""
        terms, shard = self.terms, self.shard
        state = new_state(len(chunk.hidden), accum_dtype(chunk.head.dtype), chunk.hidden.device)
        for _, tile in chunk.tiles():
            self.backend.tile_statistics(tile, terms, state)
        if shard is not None:
            shard.merge_statistics(state, terms.temperature)
        wanted = any(gradient is not None for gradient in gradients)
        summed = chunk.shared > 0 and (terms.divergence.properties.needs_mean or not wanted)
        if summed:
            for _, tile in chunk.tiles(again=True):
                if tile.teacher is not None:
                    self.backend.tile_sums(tile, terms, state)
            if shard is not None:
                shard.add(state[VALUE:])
        if wanted:
            self._add_gradients(chunk, state, summed, gradients, here)
        if shard is not None and not summed:
            shard.add(state[VALUE])
        return terms.loss(*row_values(state, chunk.rows, terms, self._total(len(chunk.head))))

    def _add_gradients(
        self,
        chunk: _Chunk,
        state: Tensor,
        summed: bool,
        gradients: list[Tensor | None],
        places: slice,
    ) -> None:
        d_hidden, d_head, d_bias = gradients
        kept = chunk.hidden if self.compact else zero_masked_rows(chunk.hidden, chunk.rows.weight)
        for here, tile in chunk.tiles(again=True):
            grad = tile.student
            if has_mixed_gemm(chunk.head):
                # The bf16 or fp16 gradient is aliased onto the float32 buffer, row by row, as in `kd_rows`.
                grad = chunk.buffers[0].view(chunk.head.dtype)[: len(grad), : grad.shape[1]]
            self.backend.tile_gradient(
                tile,
                self.terms,
                state,
                vocabulary=self._total(len(chunk.head)),
                grad=grad,
                decoupled=chunk.rows.decoupled,
                add_value=not summed,
            )
            if d_hidden is not None:
                hidden_gradient(grad, chunk.head[here], d_hidden[places], add=here.start > 0)
            if d_head is not None:
                add_weight_gradient(d_head[here], grad, kept, first=places.start == 0)
            if d_bias is not None:
                d_bias[here] += grad.sum(0, dtype=d_bias.dtype)
