"""Relations of neighbours in tiles of pairs: of whole sequences, and in windows too wide for the bands of `pairs`.

A band holds all pairs of a block of rows at once, so its memory grows with the window. Here a row is related to one tile
of its neighbours after the other, and scratch is what the caller allows. Angles follow in `angle_tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.rows import inverse_length

# The smallest tile: below it calls cost more than the memory is worth.
MIN_TILE = 8


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of rows of one batch, and what their relations are multiplied with in the gradient."""

    student: Tensor  # (B, Q, M, D_s), any strides
    teacher: Tensor  # (B, Q, M, D_t)
    valid: Tensor | None  # (B, Q, M) bool: which rows are valid; None: all
    window: int | None  # None: every row is related to all of its sequence
    weight: Tensor  # (B,)
    grad: Tensor | None  # (B, Q, M, D_s) float32 or float64, added to; None: values only

    def parts(self, several: int) -> Iterator[tuple[int, Part]]:
        """A sample and so many of its sequences at a time."""
        batch, count = self.student.shape[:2]
        for sample in range(batch):
            for start in range(0, count, several):
                some = (sample, slice(start, min(start + several, count)))
                yield (
                    sample,
                    Part(
                        self.student[some],
                        self.teacher[some],
                        None if self.valid is None else self.valid[some],
                        None if self.grad is None else self.grad[some],
                        self.window,
                        self.weight[sample],
                    ),
                )


@dataclass(frozen=True, eq=False)
class Part:
    """Some sequences of one sample."""

    student: Tensor  # (q, M, D_s)
    teacher: Tensor  # (q, M, D_t)
    valid: Tensor | None  # (q, M)
    grad: Tensor | None  # (q, M, D_s)
    window: int | None
    weight: Tensor  # 0-D

    @property
    def length(self) -> int:
        """M."""
        return self.student.shape[1]

    def around(self, centres: slice) -> slice:
        """The rows that are neighbours of any of these."""
        window = self.length if self.window is None else self.window
        return slice(max(0, centres.start - window), min(self.length, centres.stop + window))

    def related(self, centres: slice, others: slice, itself: bool) -> Tensor:
        """(1 or q, c, t) bool: valid rows that are near enough; whether a row is related to itself is `itself`."""
        device = self.student.device
        own = torch.arange(centres.start, centres.stop, device=device).unsqueeze(1)
        apart = (own - torch.arange(others.start, others.stop, device=device)).abs_()
        near = (apart <= (self.length if self.window is None else self.window)).unsqueeze(0)
        if not itself:
            near = near & (apart != 0)
        if self.valid is None:
            return near
        return near & self.valid[:, centres].unsqueeze(2) & self.valid[:, others].unsqueeze(1)

    def directions(self, features: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Unit rows (q, t, D) and 1 / length (q, t, 1), both 0 where a row is masked or has no direction.

        In float64: a float32 matmul of long rows adds up rounding that eager's sums do not have, and the
        differences taken of these numbers would show it.
        """
        vectors = features[:, rows].double()
        if self.valid is not None:
            vectors = vectors.masked_fill(~self.valid[:, rows].unsqueeze(2), 0.0)
        inverse = inverse_length(torch.linalg.vector_norm(vectors, dim=2, keepdim=True))
        return vectors * inverse, inverse


def tiles(rows: slice, size: int) -> Iterator[slice]:
    """Pieces of a range, `size` rows each and the rest."""
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def tile_size(most: int, elements: int, per_row: int, per_pair: int) -> int:
    """The most rows t up to `most` with per_row * t + per_pair * t^2 <= elements, but MIN_TILE at least."""
    root = ((per_row**2 + 4.0 * per_pair * max(0, elements)) ** 0.5 - per_row) / (2.0 * per_pair)
    return max(1, min(most, max(MIN_TILE, int(root))))


def distance_relations(sequences: Sequences, softmax: bool, elements: int) -> Tensor:
    """(B,) sums over rows: squared differences of cosines, or KL(softmax of the teacher's cosines, of the student's).

    `elements`: how many float32 numbers of scratch it may take.
    """
    length, width = sequences.student.shape[2:]
    # Numbers of 8 bytes: directions of both sides and the gradient of two tiles, and some seven tiles of pairs.
    per_row, per_pair = 2 * (6 * width + 4 * sequences.teacher.shape[3]), 14
    size = tile_size(length, elements, per_row, per_pair)
    several = max(1, elements // (per_row * size + per_pair * size**2))
    values = torch.zeros_like(sequences.weight)
    for sample, part in sequences.parts(several):
        for centres in tiles(slice(0, length), size):
            values[sample] += _add_distances(part, centres, size, softmax).to(values.dtype)
    return values


def _add_distances(part: Part, centres: slice, size: int, softmax: bool) -> Tensor:
    """Sum over these rows, 0-D float64; adds their gradient."""
    own, inverse = part.directions(part.student, centres)
    own_t, _ = part.directions(part.teacher, centres)
    around = part.around(centres)
    normalisers = _softmax_normalisers(part, centres, own, own_t, around, size) if softmax else None
    value = own.new_zeros(())
    toward, along = torch.zeros_like(own), torch.zeros_like(inverse)
    for others in tiles(around, size):
        other, other_inverse = part.directions(part.student, others)
        cosine = own @ other.mT
        target = own_t @ part.directions(part.teacher, others)[0].mT
        counted = part.related(centres, others, itself=normalisers is None)
        if normalisers is None:
            derivative = (cosine - target).masked_fill_(~counted, 0.0)
            value += derivative.square().sum()
            derivative.mul_(2.0)
        else:
            log_p_s, log_p_t = cosine - normalisers[0], target.sub_(normalisers[1])
            p_t = log_p_t.exp().masked_fill_(~counted, 0.0)
            value += (p_t * (log_p_t - log_p_s)).masked_fill_(~counted, 0.0).sum()
            derivative = log_p_s.exp_().masked_fill_(~counted, 0.0).sub_(p_t)
        if part.grad is None:
            continue
        # d cos / d f_i = (unit_j - cos * unit_i) / |f_i|, and so for j.
        derivative.mul_(part.weight)
        turned = cosine.mul_(derivative)
        toward += derivative @ other
        along += turned.sum(2, keepdim=True)
        back = derivative.mT @ own
        part.grad[:, others] += back.addcmul_(turned.sum(1).unsqueeze(2), other, value=-1.0).mul_(
            other_inverse
        )
    if part.grad is not None:
        part.grad[:, centres] += toward.addcmul_(along, own, value=-1.0).mul_(inverse)
    return value


def _softmax_normalisers(
    part: Part, centres: slice, own: Tensor, own_t: Tensor, around: slice, size: int
) -> tuple[Tensor, Tensor]:
    """log-sum-exp (q, c, 1) of the cosines of every row with the others, student and teacher; 0 where there is none."""
    sums = [torch.zeros_like(own[..., :1]) for _ in range(2)]
    for others in tiles(around, size):
        counted = part.related(centres, others, itself=False)
        for total, unit, features in zip(sums, (own, own_t), (part.student, part.teacher), strict=True):
            cosine = unit @ part.directions(features, others)[0].mT
            # Cosines are at most 1: no maximum is needed.
            total += cosine.exp_().masked_fill_(~counted, 0.0).sum(2, keepdim=True)
    student, teacher = (total.masked_fill_(total == 0.0, 1.0).log_() for total in sums)
    return student, teacher
