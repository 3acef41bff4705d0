"""The passes after the first: sums over a mixture, and last the gradient, with the value where it is not known yet."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..numeric import LOG2_E, store_tile
from .divergence import (
    centred_slope,
    divergence_terms,
    join_slope_sums,
    new_slope_sums,
    slope_sums,
)
from .online import tile_ratios
from .row import chain_factor, load_pair


class RowScalars(NamedTuple):
    """The run-time numbers of a row."""

    scale: Any  # log2(e) / T
    inverse_temperature: Any
    first: Any  # numbers of the divergence
    second: Any


class GradientFactors(NamedTuple):
    """What the terms of the gradient are multiplied by, and the row's numbers that they need."""

    divergence: Any
    ce: Any
    smoothing: Any  # of the one-hot target, the part shared by all columns
    uniform: Any  # what each column gets of it
    ce_reference: Any
    ce_inverse: Any
    label_difference: Any  # target weight times p_t - p_s of the label (decoupled)
    rest: Any  # weight of the distributions without the label (decoupled)


@triton.jit
def sums_step(sums, row, columns, numbers, totals, FLAGS: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile to the value and to <f>, (LANES,) each."""
    value, mean, uncentred_mean = sums
    pair = load_pair(row, columns, FLAGS, MASKED)
    ratios = tile_ratios(pair, totals, numbers.scale)
    terms, slope = divergence_terms(ratios, numbers.first, numbers.second, tl.constexpr(FLAGS.divergence))
    mean, uncentred_mean = slope_sums(
        mean, uncentred_mean, ratios, slope, numbers.first, tl.constexpr(FLAGS.divergence)
    )
    return value + tl.sum(terms, axis=1), mean, uncentred_mean


@triton.jit
def sums_pass(row, numbers, totals, tile, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Value and <f> of a row whose normalisers are known; from the last tile to the first, as the last pass ascends."""
    sums = new_slope_sums(LANES, tl.constexpr(FLAGS.divergence))
    full_blocks = row.shared // BLOCK
    if full_blocks * BLOCK < row.shared:
        columns = full_blocks * BLOCK + tile
        sums = sums_step(sums, row, columns, numbers, totals, FLAGS, True)
    for step in range(full_blocks):
        columns = (full_blocks - 1 - step) * BLOCK + tile
        sums = sums_step(sums, row, columns, numbers, totals, FLAGS, False)
    value, mean, uncentred_mean = sums
    return join_slope_sums(
        value, mean, uncentred_mean, numbers.first, numbers.second, tl.constexpr(FLAGS.divergence)
    )


@triton.jit
def ce_slope(p, columns, row, slopes, HAS_SMOOTHING: tl.constexpr):
    """d(cross entropy)/d(logit), weighted; p is the student's distribution at temperature 1."""
    if HAS_SMOOTHING:
        target = tl.where(columns == row.label, 1.0 - slopes.smoothing + slopes.uniform, slopes.uniform)
        slope = slopes.ce * (p - target)
    else:
        slope = slopes.ce * tl.where(columns == row.label, p - 1.0, p)
    return slope


@triton.jit
def last_step(
    value, row, grad_row, columns, numbers, totals, slopes, FLAGS: tl.constexpr, MASKED: tl.constexpr
):
    """One tile of the last pass: add the terms of the value, (LANES,), and write the gradient."""
    pair = load_pair(row, columns, FLAGS, MASKED)
    ratios = tile_ratios(pair, totals, numbers.scale)
    terms, slope = divergence_terms(ratios, numbers.first, numbers.second, tl.constexpr(FLAGS.divergence))
    if FLAGS.write_grad:
        slope = centred_slope(
            ratios, slope, totals.mean, totals.far, numbers.first, tl.constexpr(FLAGS.divergence)
        )
        if FLAGS.divergence == "decoupled":
            # Inside the rest a forward KL; between the rest and the label a KL of two categories.
            slope = slopes.rest * slope + slopes.label_difference * ratios.p_student
            slope = tl.where(columns == row.label, -slopes.label_difference, slope)
        gradient = slope * slopes.divergence
        if FLAGS.has_ce:
            p_at_one = ratios.p_student
            if FLAGS.ce_sum == "at_one":
                shifted = pair.student - totals.student_reference
                p_at_one = tl.exp2(shifted * LOG2_E) * slopes.ce_inverse
            elif FLAGS.ce_sum == "own":
                shifted = pair.student_full - slopes.ce_reference
                p_at_one = tl.exp2(shifted * LOG2_E) * slopes.ce_inverse
            gradient += ce_slope(p_at_one, columns, row, slopes, FLAGS.has_smoothing)
        if FLAGS.student_transform != "none":
            gradient *= chain_factor(pair.student_full, row.student, tl.constexpr(FLAGS.student_transform))
        if FLAGS.aliased:
            # Tile i of the gradient overwrites logits of tile i // 2. All warps have read as far as i before one writes,
            # and the tiles ascend, so nothing is overwritten that is still to be read.
            tl.debug_barrier()
        store_tile(grad_row, columns, gradient, row.V, MASKED)
    return value + tl.sum(terms, axis=1)


@triton.jit
def last_pass(
    row, grad_row, numbers, totals, slopes, tile, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The gradient, and the sum of the value's terms."""
    value = tl.zeros((LANES,), tl.float32)
    full_blocks = row.shared // BLOCK
    for block in range(full_blocks):
        columns = block * BLOCK + tile
        value = last_step(value, row, grad_row, columns, numbers, totals, slopes, FLAGS, False)
    if full_blocks * BLOCK < row.V:
        columns = full_blocks * BLOCK + tile
        value = last_step(value, row, grad_row, columns, numbers, totals, slopes, FLAGS, True)
    if FLAGS.vocab_map == "prefix":
        for block in range(full_blocks + 1, tl.cdiv(row.V, BLOCK)):
            columns = block * BLOCK + tile
            value = last_step(value, row, grad_row, columns, numbers, totals, slopes, FLAGS, True)
    return tl.sum(value, axis=0)
