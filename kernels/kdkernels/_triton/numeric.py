"""Numeric helpers of the row kernels: stores, products that survive infinities, and the online softmax of one row.

A row is read in tiles of (LANES, WIDTH) columns: the WIDTH columns of one lane are neighbours in memory and are held by
one thread, so that a tile costs wide loads and its reduction along axis 1 no traffic between threads.
Every statistic of a pass is kept per lane and joined once, after the last tile: the loops hold no barrier.

Units: maxima are logits, sums are of 2**((logit - maximum) * scale) with scale = log2(e) / T, logarithms are base 2.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_tile(row_ptr, columns, values, V, MASKED: tl.constexpr):
    """Write one tile of a row, rounded once to the dtype of the row."""
    values = values.to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + columns, values, mask=columns < V)
    else:
        tl.store(row_ptr + columns, values)


@triton.jit
def write_zeros(row_ptr, V, tile, BLOCK: tl.constexpr):
    """Zero-fill a row without reading it."""
    zeros = tl.zeros(tile.shape, tl.float32)
    full_blocks = V // BLOCK
    for block in range(full_blocks):
        store_tile(row_ptr, block * BLOCK + tile, zeros, V, False)
    if full_blocks * BLOCK < V:
        store_tile(row_ptr, full_blocks * BLOCK + tile, zeros, V, True)


@triton.jit
def finite_or_zero(maximum):
    """Reference point of exponents: the maximum, or 0 where nothing finite was seen, as -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def times_unless_zero(weight, values):
    """weight * values, and 0 where the weight is 0: log-ratios are infinite there (0 * inf). Keeps NaN weights."""
    return tl.where(weight == 0.0, 0.0, weight * values)


@triton.jit
def rescaled(total, maximum, reference, scale):
    """A sum of exponentials relative to `maximum`, as one relative to `reference`."""
    return total * tl.exp2((maximum - reference) * scale)


@triton.jit
def softmax_step(maximum, total, logits, scale):
    """Take one tile into the (maximum, sum) of every lane; also the logits shifted by the new maxima."""
    next_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    reference = finite_or_zero(next_maximum)
    shifted = logits - reference[:, None]
    total = rescaled(total, maximum, reference, scale) + tl.sum(tl.exp2(shifted * scale), axis=1)
    return next_maximum, total, shifted


@triton.jit
def sum_at_one_step(total_at_one, maximum, next_maximum, shifted):
    """Take the tile that `softmax_step` took into the sum at temperature 1, from the same maxima."""
    total_at_one = rescaled(total_at_one, maximum, finite_or_zero(next_maximum), LOG2_E)
    return total_at_one + tl.sum(tl.exp2(shifted * LOG2_E), axis=1)


@triton.jit
def join_lanes(maximum, total, scale):
    """Of a whole row, from the (maximum, sum) of every lane: its reference point and its sum."""
    reference = finite_or_zero(tl.max(maximum, axis=0))
    return reference, tl.sum(rescaled(total, maximum, reference, scale), axis=0)


@triton.jit
def inverse_length(squares, shortest):
    """1 / length from a sum of squares: 0 for what is too short to have a direction, NaN where the squares left fp32."""
    length = tl.sqrt_rn(squares)
    short = length < shortest
    length = tl.where(length == float("inf"), float("nan"), length)
    return tl.where(short, 0.0, tl.div_rn(1.0, tl.where(short, 1.0, length)))


@triton.jit
def tanh(x):
    """Hyperbolic tangent, 1.3 units in the last place: an odd polynomial (fitted) below 0.625, an exponential above."""
    square = x * x
    series = square * (square * 2.1475369e-3 - 8.1826737e-3) + 2.1702968e-2
    series = square * (square * (square * series - 5.3947203e-2) + 1.3333210e-1) - 3.3333331e-1
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    return tl.where(size < 0.625, x + x * (square * series), tl.where(x < 0.0, -far, far))
