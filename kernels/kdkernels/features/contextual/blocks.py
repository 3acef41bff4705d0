"""The schedule of `contextual_relation_loss`: blocks of rows, their bands of inner products, and the gradient back.

Whole sequences, and windows whose bands would not fit, are related in the tiles of `pair_tiles` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core import bands
from ...core.autograd import Tensors
from ...core.backend import load_backend
from ...core.bands import ROW_STEP, AngleSide, DirectAngles
from ...core.matmul import accum_dtype
from ...options import Impl
from ...reference.relation_counts import Variant
from .angle_tiles import angle_relations
from .backend import Rows, WindowBackend
from .pair_tiles import Sequences, distance_relations

# Scratch as a share of the student's features, so that it and the gradient stay below two of them.
SCRATCH_SHARE = 0.6

# Numbers that bands may always have, 8 MiB of float32: blocks of small features would be mostly calls. With fewer rows than
# these any block is, and bands that do not fit even so are not made.
MIN_SCRATCH = 1 << 21
MIN_ROWS = 64

# Scratch of tiles of pairs, in numbers: less is mostly overhead, more is of no use.
TILE_SCRATCH = (1 << 17, 1 << 22)


@dataclass(frozen=True, eq=False)
class _Axis:
    """The relations of one axis and what their sums are multiplied with; None is not computed."""

    transposed: bool  # False: tokens of a layer; True: layers of a token
    distance_scale: Tensor | None  # (B,)
    angle_scale: Tensor | None


@dataclass(frozen=True)
class _Block:
    """A stream of rows: b0:b1 x q0:q1 x m0:m1 of (B, Q, M), of which m in c0:c1 are centres."""

    batch: slice
    sequences: slice
    positions: slice
    centres: slice

    def of(self, tensor: Tensor) -> Tensor:
        """The block's part of a tensor (B, Q, M, ...)."""
        return tensor[self.batch, self.sequences, self.positions]


def _blocks(shape: tuple[int, int, int], rows: int, window: int) -> Iterator[_Block]:
    """Whole samples while they fit in `rows`, else whole sequences, else parts of one with `window` rows around."""
    batch, sequences, length = shape
    if 0 in shape:
        return
    whole = slice(0, length)
    if length > rows:
        rows = max(MIN_ROWS, rows - 2 * window)
        for b in range(batch):
            for q in range(sequences):
                for start in range(0, length, rows):
                    stop = min(start + rows, length)
                    around = slice(max(0, start - window), min(length, stop + window))
                    yield _Block(slice(b, b + 1), slice(q, q + 1), around, slice(start, stop))
        return
    several, some = rows // (sequences * length), max(1, rows // length)
    if several:
        several = -(-batch // -(-batch // several))  # as many blocks, of one size
        for b in range(0, batch, several):
            yield _Block(slice(b, min(b + several, batch)), slice(0, sequences), whole, whole)
        return
    for b in range(batch):
        for q in range(0, sequences, some):
            yield _Block(slice(b, b + 1), slice(q, min(q + some, sequences)), whole, whole)


@dataclass(frozen=True)
class ContextualRelations:
    """Solver of `autograd` whose rows are the samples of a batch.

    Its tensors are student (B, L, N, D_s), teacher (B, L, N, D_t), mask (B, N) or None, and what the sums of each sample
    are multiplied with, (1, 2, B): distances and angles of tokens; (2, 2, B): and of layers.
    """

    impl: Impl
    window: int
    variant: Variant
    distances: bool
    angles: bool

    @property
    def fp16_bound(self) -> float | None:
        """None: gradients are summed in float32 whatever the dtype, with every factor in them."""
        return None

    @property
    def backend(self) -> WindowBackend:
        """The functions that do the work."""
        return cast(WindowBackend, cast(Any, load_backend(self.impl)).contextual)

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Values (B,) and the gradient of the student's features."""
        student, teacher, mask, scales = tensors
        assert student is not None and teacher is not None and scales is not None
        dtype, batch = accum_dtype(student.dtype), student.shape[0]
        values = torch.zeros(batch, dtype=dtype, device=student.device)
        weight = torch.ones_like(values) if weight is None else weight
        if not needs[0]:
            self._add(scales, student, teacher, mask, weight, values, None)
            return values, (None, None, None, None)
        grad = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
        # In half precision the sums of few samples at a time are kept in float32.
        per_sample = max(1, student.shape[1] * student.shape[2])
        some = max(1, self.backend.block_rows(student.device) // per_sample)
        some = batch if grad.dtype == dtype else min(some, max(1, batch // 4))
        for start in range(0, batch, max(1, some)):
            part = slice(start, start + some)
            total = grad[part] if grad.dtype == dtype else grad[part].to(dtype)
            part_mask = None if mask is None else mask[part]
            sides = (student[part], teacher[part])
            self._add(scales[..., part], *sides, part_mask, weight[part], values[part], total)
            if total.dtype != grad.dtype:
                grad[part] = total
        return values, (grad, None, None, None)

    def _add(
        self,
        scales: Tensor,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        values: Tensor,  # (B,)
        grad: Tensor | None,  # (B, L, N, D_s), float32 or float64
    ) -> None:
        """Add values and gradient of every axis."""
        for index, scale in enumerate(scales):
            axis = _Axis(bool(index), scale[0] if self.distances else None, scale[1] if self.angles else None)
            tensors = (student, teacher, grad)
            if axis.transposed:
                tensors = tuple(None if tensor is None else tensor.transpose(1, 2) for tensor in tensors)
            sides = (tensors[0], tensors[1])
            assert sides[0] is not None and sides[1] is not None
            valid = None
            if mask is not None:
                valid = mask.unsqueeze(2 if axis.transposed else 1).expand(sides[0].shape[:3])
            _AxisPass(self, axis, sides[0], sides[1], valid, weight).add(values, tensors[2])


class _AxisPass:
    """One pass over the blocks of one axis."""

    def __init__(
        self,
        solver: ContextualRelations,
        axis: _Axis,
        student: Tensor,  # (B, Q, M, D_s)
        teacher: Tensor,
        valid: Tensor | None,  # (B, Q, M) bool
        weight: Tensor,  # (B,)
    ) -> None:
        self.backend, self.axis, self.weight = solver.backend, axis, weight
        self.student, self.teacher, self.valid = student, teacher, valid
        self.official = solver.variant == "official"
        length, width = student.shape[2:]
        self.window = min(solver.window, max(1, length - 1))
        self.margin = 2 * self.window
        self.dtype = weight.dtype
        scratch = int(SCRATCH_SHARE * student.numel())
        self.tile_scratch = min(max(TILE_SCRATCH[0], scratch), TILE_SCRATCH[1])
        per_row = self.backend.row_elements(width, teacher.shape[3], self.margin + 1)
        # The rows around a block have pairs as well.
        affordable = max(MIN_SCRATCH, scratch) // per_row - self.window
        self.wide = affordable < MIN_ROWS
        self.rows = min(self.backend.block_rows(student.device), affordable)

    def add(self, values: Tensor, grad: Tensor | None) -> None:
        """Add values (B,) and the gradient (B, Q, M, D_s)."""
        scale = self.axis.distance_scale
        in_tiles = self.official or self.wide
        if scale is not None and in_tiles:
            sequences = self._sequences(None if self.official else self.window, scale, grad)
            values += distance_relations(sequences, self.official, self.tile_scratch) * scale
        if self.wide and self.axis.angle_scale is not None:
            sequences = self._sequences(self.window, self.axis.angle_scale, grad)
            values += angle_relations(sequences, self.tile_scratch) * self.axis.angle_scale
        distance_scale = None if in_tiles else scale
        angle_scale = None if self.wide else self.axis.angle_scale
        if distance_scale is None and angle_scale is None:
            return
        batch, count, length = self.student.shape[:3]
        for block in _blocks((batch, count, length), self.rows, self.window):
            part = None if grad is None else block.of(grad)
            self._add_block(block, distance_scale, angle_scale, values, part)

    def _sequences(self, window: int | None, scale: Tensor, grad: Tensor | None) -> Sequences:
        weight = self.weight * scale
        return Sequences(self.student, self.teacher, self.valid, window, weight, grad)

    def _band(self, rows: Rows, width: int, margin: int, count: int) -> Tensor:
        """Inner products (width + 1, margin + R + margin)."""
        band = self.weight.new_zeros(width + 1, count + 2 * margin, dtype=rows.dtype)
        rows.products(band[:, margin : margin + count])
        return band

    def _add_block(
        self,
        block: _Block,
        distance_scale: Tensor | None,
        angle_scale: Tensor | None,
        values: Tensor,
        grad: Tensor | None,
    ) -> None:
        shape = block.of(self.student).shape
        count = shape[:3].numel()
        rows = count + -count % ROW_STEP
        padding = (0, rows - count)
        place = torch.arange(block.positions.start, block.positions.stop, device=values.device)
        position = pad(place.repeat(count // shape[2]), padding)
        valid = None if self.valid is None else pad(block.of(self.valid).reshape(-1), padding)
        counted = valid if valid is not None else torch.arange(rows, device=values.device) < count
        centre = counted & (position >= block.centres.start) & (position < block.centres.stop)
        sides = [
            self.backend.Rows(block.of(side), valid, rows, self.margin, self.dtype)
            for side in (self.student, self.teacher)
        ]

        def of_rows(samples: Tensor) -> Tensor:
            """(R,) from one number of each sample."""
            each = samples[block.batch].repeat_interleave(count // shape[0], output_size=count)
            return pad(each, padding)

        total = self.weight.new_zeros(rows)
        related = bands.valid_pairs(counted, centre, position, self.student.shape[2], self.window)
        if distance_scale is not None:
            value = self._distances(sides, related, centre, of_rows(self.weight * distance_scale), grad)
            total += value * of_rows(distance_scale)
        if angle_scale is not None:
            for side in sides:
                side.centre()
            value = self._angles(block, sides, valid, related, of_rows(self.weight * angle_scale), grad)
            total += value * of_rows(angle_scale)
        values[block.batch] += total[:count].view(shape[0], -1).sum(1)

    def _distances(
        self, sides: list[Rows], related: Tensor, centre: Tensor, row_scale: Tensor, grad: Tensor | None
    ) -> Tensor:
        """(R,) distance relations; adds their gradient times `row_scale`."""
        window, rows = self.window, row_scale.shape[0]
        (cosine, inverse), (teacher, _) = (
            bands.cosines(self._band(side, window, window, rows), window, rows) for side in sides
        )
        value, derivative = bands.squared_errors(cosine, teacher, related, centre)
        if grad is not None:
            factors = bands.cosine_coefficients(derivative, cosine, inverse, window)
            sides[0].apply(factors.mul_(row_scale), grad)
        return value

    def _angles(
        self,
        block: _Block,
        sides: list[Rows],
        valid: Tensor | None,
        related: Tensor,
        row_scale: Tensor,
        grad: Tensor | None,
    ) -> Tensor:
        """(R,) angle relations; adds their gradient. Rows with a nearly equal neighbour take the direct way."""
        student, teacher, near = self._angle_sides(sides, related, bands.NEAR)
        if self.dtype == torch.float32 and self.backend.widen(near):
            del student, teacher
            for index, side in enumerate((self.student, self.teacher)):
                sides[index] = self.backend.Rows(
                    block.of(side), valid, near.shape[0], self.margin, torch.float64
                )
                sides[index].centre()
            student, teacher, near = self._angle_sides(sides, related, bands.NEAR_WIDENED)
        near = self.backend.direct_rows(near)
        for side in (student, teacher):
            side.scale.masked_fill_(near | ~related, 0.0)
        if grad is None:
            value = self.backend.angle_values(student, teacher)
        else:
            gradient = self.backend.angle_gradient(student, teacher)
            value = gradient.values
            factors = bands.angle_coefficients(student, gradient)
            sides[0].apply(factors.mul_(row_scale), grad)
        direct = DirectAngles(block.of(self.student), block.of(self.teacher), near, related, row_scale)
        return self.backend.direct_angles(direct, grad).add_(value)

    def _angle_sides(
        self, sides: list[Rows], related: Tensor, limit: float
    ) -> tuple[AngleSide, AngleSide, Tensor]:
        """Both sides of the angles, and (R,) bool: which rows have a nearly equal neighbour on one of them."""
        window, rows = self.window, related.shape[1]
        (student, near_s), (teacher, near_t) = (
            bands.angle_side(self._band(side, 2 * window, window, rows), window, rows, limit)
            for side in sides
        )
        return student, teacher, (related & (near_s | near_t)).any(0)
