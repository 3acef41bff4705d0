"""Relations of one block of rows, from inner products: what both back ends have in common.

A block is a stream of R rows, whole sequences one after the other or a part of one. Numbers of pairs are kept as
bands, so that neighbouring rows are neighbours in memory:

    band      (K + 1, M + R)   entry [d, M + i] belongs to the unordered pair of rows i and i + d; M zeros before
    directed  (2 W + 1, R)     entry [W + a, i] belongs to row i and its neighbour i + a

Pairs that reach over the end of a sequence hold numbers too; `valid` drops them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import NORM_EPS
from .rows import inverse_length

# A block's rows are padded to a multiple of this with masked rows.
ROW_STEP = 32

# An angle at i is taken from inner products of centred rows c where |f_i - f_j|^2 is above this times
# |c_i|^2 + |c_j|^2; below, more than three of its bits have cancelled, and it is taken from differences of rows.
NEAR = 1.0 / 8.0

# The same in float64 for features in float32, which leaves their angles the digits of float32.
NEAR_WIDENED = 2.0**-26


class AngleSide(NamedTuple):
    """One model's part of the angles at every row: cos = (<c_j, c_k> + lift_j + lift_k) * scale_j * scale_k."""

    band: Tensor  # (2 W + 1, W + R + W) inner products of centred rows, zeros on either side
    lift: Tensor  # (2 W + 1, R) directed: |c_i|^2 / 2 - <c_i, c_j>
    scale: Tensor  # (2 W + 1, R) directed: 1 / |f_i - f_j|, 0 where the pair is masked


class AngleGradient(NamedTuple):
    """Derivatives of the sum of squared errors over ordered pairs (j, k), as the back ends write them."""

    band: Tensor  # (2 W + 1, R) with respect to <c_j, c_k>, each unordered pair once; row 0 is 0
    lift: Tensor  # (2 W + 1, R) with respect to lift_j
    log_scale: Tensor  # (2 W + 1, R) with respect to the logarithm of scale_j
    values: Tensor  # (R,) the sums themselves


def directed(band: Tensor, window: int, rows: int, margin: int) -> Tensor:
    """(2 W + 1, R) of a band with `margin` >= window columns before the first row."""
    length, start = band.stride(0), band.storage_offset() + margin
    below = band.as_strided((window, rows), (length - 1, 1), start + length - 1)
    return torch.cat([below.flip(0), band[: window + 1, margin : margin + rows]])


def reverse(pairs: Tensor) -> Tensor:
    """Entry [a, i] of directed pairs becomes [-a, i + a]: the same pair seen from its other end, 0 outside."""
    offsets, rows = pairs.shape
    flipped = torch.nn.functional.pad(pairs.flip(0), (offsets // 2, offsets // 2))
    return flipped.as_strided((offsets, rows), (flipped.stride(0) + 1, 1))


def of_neighbours(values: Tensor, window: int, margin: int) -> Tensor:
    """(2 W + 1, R) view: for each row the value of each neighbour, from (margin + R + margin,) values.

    Both strides are 1 (an overlapping view): write results with out= to get a contiguous tensor.
    """
    rows = values.shape[0] - 2 * margin
    start = values.storage_offset() + margin - window
    return values.as_strided((2 * window + 1, rows), (1, 1), start)


def valid_pairs(valid: Tensor, centre: Tensor, position: Tensor, length: int, window: int) -> Tensor:
    """(2 W + 1, R) bool: other rows of the same sequence, both valid, seen from rows that are centres of this block."""
    offsets = torch.arange(-window, window + 1, device=valid.device).unsqueeze(1)
    neighbour = position + offsets
    inside = (neighbour >= 0) & (neighbour < length) & (offsets != 0)
    padded = torch.nn.functional.pad(valid, (window, window))
    return inside.logical_and_(centre).logical_and_(of_neighbours(padded, window, window))


def cosines(band: Tensor, window: int, rows: int) -> tuple[Tensor, Tensor]:
    """Directed cosines (2 W + 1, R) of rows and 1 / length (R,), 0 for what is too short to have a direction."""
    inverse = inverse_length(band[0].clamp_min(0.0).sqrt())
    own = inverse[window : window + rows]
    cosine = directed(band, window, rows, window).mul_(own).mul_(of_neighbours(inverse, window, window))
    cosine[window] = own != 0.0
    return cosine, own


def squared_errors(student: Tensor, teacher: Tensor, valid: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared differences of cosines of every row (R,), and its derivative (2 W + 1, R)."""
    window = valid.shape[0] // 2
    error = student - teacher
    # Of a row with itself the cosine is constant: 1, and 0 where only one side has a direction.
    own = error[window].masked_fill(~centre, 0.0)
    error.masked_fill_(~valid, 0.0)
    return torch.linalg.vecdot(error, error, dim=0).add_(own.square()), error.mul_(2.0)


def cosine_coefficients(gradient: Tensor, cosine: Tensor, inverse: Tensor, window: int) -> Tensor:
    """(2 W + 1, R) factors of the rows i + a in the gradient of row i, from the derivative of directed cosines."""
    both = gradient + reverse(gradient)
    padded = torch.nn.functional.pad(inverse, (window, window))
    along = (both * cosine).sum(0)
    # d cos / d f_i = (unit_j - cos * unit_i) / |f_i|
    factors = both.mul_(of_neighbours(padded, window, window))
    factors[window] = -along * inverse
    return factors.mul_(inverse)


def angle_side(band: Tensor, window: int, rows: int, limit: float) -> tuple[AngleSide, Tensor]:
    """Lifts of one side, scales that still hold every pair, and (2 W + 1, R) bool: which pairs are nearly equal."""
    # Sums of four of them stay in the dtype; a NaN where they would not, as an infinite distance looks like no relation.
    squares = band[0].masked_fill(band[0] > torch.finfo(band.dtype).max / 8, torch.nan)
    own = squares[window : window + rows]
    product = directed(band, window, rows, window)
    size = own.expand_as(product).clone(memory_format=torch.contiguous_format)
    size.add_(of_neighbours(squares, window, window))
    distance = size - 2.0 * product
    # Vectors too short to have a direction are found where differences are taken.
    near = distance <= size.mul_(limit).clamp_min_(NORM_EPS**2)
    scale = distance.clamp_min_(torch.finfo(band.dtype).tiny).rsqrt_()
    return AngleSide(band, product.neg_().add_(own, alpha=0.5), scale), near


def angle_cosines(
    product: Tensor, lift_j: Tensor, lift_k: Tensor, scale_j: Tensor, scale_k: Tensor, out: Tensor
) -> Tensor:
    """Cosines of the angles between neighbours j and k, from the inner products of their centred rows."""
    return torch.add(product, lift_j, out=out).add_(lift_k).mul_(scale_j).mul_(scale_k)


def angle_coefficients(side: AngleSide, gradient: AngleGradient) -> Tensor:
    """(4 W + 1, R) factors of the centred rows i + a in the gradient of row i."""
    offsets, rows = side.lift.shape
    window = offsets // 2
    # distance^2 = |c_i|^2 + |c_j|^2 - 2 <c_i, c_j>, and the logarithm of scale is -1/2 of the logarithm of that.
    distance = side.scale.square().mul_(gradient.log_scale).mul_(-0.5)
    product = -(gradient.lift + 2.0 * distance)
    factors = band_of(gradient.band, 2 * window)
    factors[1 : window + 1, 2 * window :] += (product + reverse(product))[window + 1 :]
    square = (0.5 * gradient.lift + distance + reverse(distance)).sum(0)
    symmetric = directed(factors, 2 * window, rows, 2 * window)
    symmetric[2 * window] = 2.0 * square
    return symmetric


def band_of(values: Tensor, margin: int) -> Tensor:
    """A band with `margin` zeros before the first row."""
    return torch.nn.functional.pad(values, (margin, 0))


def unit_steps(differences: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Differences (..., V, D) to unit ones in place, and 1 / length (..., V, 1); 0 where not counted or without a direction."""
    differences.masked_fill_(~counted.unsqueeze(-1), 0.0)
    inverse = inverse_length(torch.linalg.vector_norm(differences, dim=-1, keepdim=True))
    return differences.mul_(inverse), inverse


def along_steps(grad: Tensor, steps: Tensor, inverse: Tensor) -> Tensor:
    """From the gradient of unit steps (..., V, D), in place, that of the differences."""
    along = torch.linalg.vecdot(grad, steps).unsqueeze(-1)
    return grad.addcmul_(along, steps, value=-1.0).mul_(inverse)


@dataclass(frozen=True, eq=False)
class DirectAngles:
    """Rows whose angles are taken from differences of features, since a neighbour is nearly equal to them."""

    student: Tensor  # (b, q, m, D_s) features of the block, any strides
    teacher: Tensor  # (b, q, m, D_t)
    rows: Tensor  # (R,) bool
    valid: Tensor  # (2 W + 1, R) bool
    row_scale: Tensor  # (R,) multiplies the gradient

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where rows of the stream are in (b, q, m); rows after its end get the last place."""
        batch, sequences, length = self.student.shape[:3]
        rows = rows.clamp_max(batch * sequences * length - 1)
        return rows // (sequences * length), rows // length % sequences, rows % length
