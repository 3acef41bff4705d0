"""Angles between all neighbours of a row in tiles of pairs: windows too wide for the bands of `pairs`.

Where the host may look at the numbers, cosines come from inner products in float64, as in `pairs`:
cos = (<c_j, c_k> + lift_j + lift_k) * scale_j * scale_k for centred rows c. Rows with a neighbour that is nearly, but not
quite, equal to them are taken from differences of features, and so are all rows of other devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.bands import NEAR_WIDENED, along_steps, angle_cosines, unit_steps
from ...options import NORM_EPS
from .pair_tiles import Part, Sequences, tile_size, tiles

# Rows that are related at a time, and the most of their neighbours: their pairs stay in the L2 cache.
CENTRES = 16
MAX_NEIGHBOURS = 64


def angle_relations(sequences: Sequences, elements: int) -> Tensor:
    """(B,) sums over rows and ordered pairs of their neighbours: squared differences of cosines of angles.

    `elements`: how many float32 numbers of scratch it may take.
    """
    readable = sequences.student.device.type == "cpu"
    values = torch.zeros_like(sequences.weight)
    for sample, part in sequences.parts(1):
        sides = (_Rows(part.student[0], part), _Rows(part.teacher[0], part)) if readable else None
        for centres in tiles(slice(0, part.length), CENTRES):
            if sides is None:
                values[sample] += _from_differences(part, centres, elements)
            else:
                values[sample] += _from_products(part, sides, centres, elements)
    return values


class _Rows:
    """One model's rows of a sequence without their mean, in float64: differences stay, products shrink."""

    def __init__(self, features: Tensor, part: Part) -> None:
        self.features = features  # (M, D)
        self.valid = None if part.valid is None else part.valid[0]
        self.mean = features.new_zeros(features.shape[1], dtype=torch.float64)
        count = len(features) if self.valid is None else max(1, int(self.valid.sum()))
        self.mean = sum((self.of(tile).sum(0) for tile in _all(features)), self.mean) / count

    def of(self, tile: slice) -> Tensor:
        """(t, D); masked rows hold something finite."""
        rows = self.features[tile].to(torch.float64, copy=True)
        if self.valid is not None:
            rows.masked_fill_(~self.valid[tile].unsqueeze(1), 0.0)
        return rows.sub_(self.mean)


class _Angles:
    """One model's angles at c centres between their n neighbours."""

    def __init__(self, rows: _Rows, part: Part, centres: slice, around: slice, size: int) -> None:
        self.rows = rows
        own, count = rows.of(centres), around.stop - around.start
        squares = own.square().sum(1, keepdim=True)
        product, both = own.new_empty(len(own), count), own.new_empty(len(own), count)
        for tile in tiles(slice(0, count), size):
            others = rows.of(_shifted(tile, around.start))
            product[:, tile] = own @ others.mT
            both[:, tile] = squares + others.square().sum(1)
        distance = both - 2.0 * product
        counted = part.related(centres, around, itself=False)[0]
        # Vectors too short to have a direction are found where differences are taken.
        self.near = counted & (distance <= both.mul_(NEAR_WIDENED).clamp_min_(NORM_EPS**2))
        self.scale = distance.clamp_min_(torch.finfo(torch.float64).tiny).rsqrt_()  # 1 / |f_i - f_j|
        self.scale.masked_fill_(~counted | self.near, 0.0)
        self.lift = product.neg_().add_(squares, alpha=0.5)  # |c_i|^2 / 2 - <c_i, c_j>

    def unequal(self, centres: slice, around: slice) -> Tensor:
        """(c,) bool: which centres have a neighbour that is nearly, but not quite, equal to them."""
        centre, other = self.near.nonzero().unbind(1)
        found = torch.zeros(len(self.near), dtype=torch.bool)
        for one, two in zip(centre.split(MAX_NEIGHBOURS), other.split(MAX_NEIGHBOURS), strict=True):
            features = self.rows.features
            differ = (features[one + centres.start] != features[two + around.start]).any(1)
            found[one[differ]] = True
        return found

    def cosines(self, left: Tensor, right: Tensor, first: slice, second: slice) -> Tensor:
        """(c, t, t) between two tiles of neighbours, given their rows."""
        lift_j, scale_j = (side[:, first].unsqueeze(2) for side in (self.lift, self.scale))
        lift_k, scale_k = (side[:, second].unsqueeze(1) for side in (self.lift, self.scale))
        product = left @ right.mT
        out = product.new_empty(len(lift_j), *product.shape)
        return angle_cosines(product, lift_j, lift_k, scale_j, scale_k, out)


def _from_products(part: Part, sides: tuple[_Rows, _Rows], centres: slice, elements: int) -> Tensor:
    """Sum over these rows, 0-D; adds its gradient."""
    around = part.around(centres)
    width, both = part.student.shape[2], part.student.shape[2] + part.teacher.shape[2]
    # Numbers of 8 bytes: rows of the centres; of two tiles with gradients, and some five tiles of pairs for every centre.
    elements -= 2 * CENTRES * (width + both)
    size = tile_size(MAX_NEIGHBOURS, elements, 4 * (width + both), 10 * CENTRES)
    student, teacher = (_Angles(rows, part, centres, around, size) for rows in sides)
    direct = student.unequal(centres, around) | teacher.unequal(centres, around)
    for side in (student, teacher):
        side.scale.masked_fill_(direct.unsqueeze(1), 0.0)
    value, own = student.lift.new_zeros(()), student.rows.of(centres)
    lift, log_scale = torch.zeros_like(student.lift), torch.zeros_like(student.lift)
    places = list(tiles(slice(0, around.stop - around.start), size))
    for index, first in enumerate(places):
        left, left_t = (side.rows.of(_shifted(first, around.start)) for side in (student, teacher))
        for second in places[index:]:
            right, right_t = left, left_t
            if second != first:
                right, right_t = (side.rows.of(_shifted(second, around.start)) for side in (student, teacher))
            cosine = student.cosines(left, right, first, second)
            error = cosine - teacher.cosines(left_t, right_t, first, second)
            # A pair of different tiles stands for (j, k) and (k, j).
            orders = 1.0 if second == first else 2.0
            value += error.square().sum() * orders
            if part.grad is None:
                continue
            error.mul_(2.0 * orders * part.weight)
            cosine.mul_(error)
            log_scale[:, first] += cosine.sum(2)
            log_scale[:, second] += cosine.sum(1)
            error.mul_(student.scale[:, first].unsqueeze(2)).mul_(student.scale[:, second].unsqueeze(1))
            product = error.sum(0)
            for place, lifted, factors, others in (
                (first, error.sum(2), product, right),
                (second, error.sum(1), product.mT, left),
            ):
                lift[:, place] += lifted
                # Both parts are long where their difference c_k - c_i is short: they meet before they are rounded.
                toward = (factors @ others).addmm_(lifted.mT, own, alpha=-1.0)
                part.grad[0, _shifted(place, around.start)] += toward
    if part.grad is not None:
        _add_of_distances(part.grad[0], student, lift, log_scale, centres, around, size)
    value = value.to(part.weight.dtype)
    for row in direct.nonzero().flatten().tolist():
        centre = centres.start + row
        value = value + _from_differences(part, slice(centre, centre + 1), elements)
    return value


def _add_of_distances(
    grad: Tensor, side: _Angles, lift: Tensor, log_scale: Tensor, centres: slice, around: slice, size: int
) -> None:
    """Add what neighbours get through the lengths of differences, and what centres get through these and lifts."""
    # |f_i - f_j|^2 = |c_i|^2 + |c_j|^2 - 2 <c_i, c_j>, and the logarithm of scale is -1/2 of the logarithm of that.
    distance = log_scale.mul_(side.scale.square()).neg_()
    product = lift + distance
    own = side.rows.of(centres)
    total = own * product.sum(1, keepdim=True)
    for tile in tiles(slice(0, around.stop - around.start), size):
        others = side.rows.of(_shifted(tile, around.start))
        total.addmm_(product[:, tile], others, alpha=-1.0)
        others.mul_(distance[:, tile].sum(0).unsqueeze(1)).addmm_(distance[:, tile].mT, own, alpha=-1.0)
        grad[_shifted(tile, around.start)] += others
    grad[centres] += total


def _from_differences(part: Part, centres: slice, elements: int) -> Tensor:
    """Sum over these rows, 0-D; adds its gradient."""
    width = part.student.shape[2]
    # Per centre: differences of both sides to two tiles of neighbours, gradients, and three tiles of pairs.
    count, around = centres.stop - centres.start, part.around(centres)
    per_row, per_pair = count * (5 * width + 3 * part.teacher.shape[2]), 3 * count
    size = tile_size(part.length, elements, per_row, per_pair)
    value = torch.zeros_like(part.weight)
    for others in tiles(around, size):
        steps, inverse = _steps(part, part.student, centres, others)
        steps_t, _ = _steps(part, part.teacher, centres, others)
        grad = torch.zeros_like(steps)
        for tile in tiles(around, size):
            to_tile, to_tile_t = steps, steps_t
            if tile != others:
                to_tile, _ = _steps(part, part.student, centres, tile)
                to_tile_t, _ = _steps(part, part.teacher, centres, tile)
            error = (steps @ to_tile.mT).sub_(steps_t @ to_tile_t.mT)
            value += error.square().sum()
            if part.grad is not None:
                grad += error @ to_tile
        if part.grad is not None:
            # Of the square, and of each pair as (j, k) and (k, j).
            grad = along_steps(grad.mul_(4.0), steps, inverse).mul_(part.weight)
            part.grad[0, others] += grad.sum(0)
            part.grad[0, centres] -= grad.sum(1)
    return value


def _steps(part: Part, features: Tensor, centres: slice, others: slice) -> tuple[Tensor, Tensor]:
    """Unit differences (c, t, D) of others to centres and 1 / length (c, t, 1), 0 where unrelated."""
    dtype = part.weight.dtype
    differences = features[0, others].to(dtype).unsqueeze(0) - features[0, centres].to(dtype).unsqueeze(1)
    return unit_steps(differences, part.related(centres, others, itself=False)[0])


def _shifted(place: slice, start: int) -> slice:
    return slice(place.start + start, place.stop + start)


def _all(features: Tensor) -> list[slice]:
    return list(tiles(slice(0, len(features)), MAX_NEIGHBOURS))
