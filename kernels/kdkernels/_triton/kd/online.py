"""The first pass over a row: online maxima and sums of both sides, per lane, joined once at its end."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..numeric import LOG2_E, finite_or_zero, join_lanes, softmax_step, sum_at_one_step
from .divergence import Ratios, mean_slope, ratio_move, ratio_step
from .row import load_pair


class State(NamedTuple):
    """What the first pass carries, each (LANES,); what its flags leave unused stays as it is and costs nothing."""

    student_max: Any
    student_total: Any
    teacher_max: Any
    teacher_total: Any
    total_at_one: Any  # the student's at temperature 1, from the same maximum
    ratio_sum: Any
    full_max: Any  # of all of the student's columns, where the divergence leaves some out
    full_total: Any  # their sum at temperature 1
    logit_sum: Any  # of the student's logits, measured from `pivot`


class Totals(NamedTuple):
    """The statistics of a row, scalars. Sums are of 2**((logit - reference) * scale)."""

    student_reference: Any
    student_inverse: Any  # 1 / sum
    student_log: Any  # log2(sum)
    teacher_reference: Any
    teacher_inverse: Any
    teacher_log: Any
    log_partition_ratio: Any  # log2 of the quotient of both sums
    mean: Any  # <f>, where it is known by now
    far: Any  # whether it leaves out the constant of f (skew KL); 1 / sum of the products (Rényi)


@triton.jit
def new_state(LANES: tl.constexpr):
    """Nothing seen yet."""
    lowest = tl.full((LANES,), float("-inf"), tl.float32)
    nothing = tl.zeros((LANES,), tl.float32)
    return State(lowest, nothing, lowest, nothing, nothing, nothing, lowest, nothing, nothing)


@triton.jit
def statistics_step(
    state, tile, columns, row, numbers, pivot, FLAGS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Take one tile of both rows."""
    student_max, student_total, student_shifted = softmax_step(
        state.student_max, state.student_total, tile.student, numbers.scale
    )
    teacher_max, teacher_total, teacher_shifted = softmax_step(
        state.teacher_max, state.teacher_total, tile.teacher, numbers.scale
    )
    total_at_one = state.total_at_one
    if FLAGS.ce_sum == "at_one":
        total_at_one = sum_at_one_step(total_at_one, state.student_max, student_max, student_shifted)
    ratio_sum = ratio_move(
        state.ratio_sum,
        state.student_total,
        tl.exp2((state.student_max - finite_or_zero(student_max)) * numbers.scale),
        finite_or_zero(state.student_max) - finite_or_zero(student_max),
        finite_or_zero(state.teacher_max) - finite_or_zero(teacher_max),
        tl.constexpr(FLAGS.divergence),
    )
    ratio_sum = ratio_step(
        ratio_sum, student_shifted, teacher_shifted, numbers.scale, tl.constexpr(FLAGS.divergence)
    )
    full_max = state.full_max
    full_total = state.full_total
    if FLAGS.ce_sum == "own":
        full_max, full_total, _ = softmax_step(full_max, full_total, tile.student_full, LOG2_E)
    logit_sum = state.logit_sum
    if FLAGS.has_smoothing:
        distance = tile.student_full - pivot
        if MASKED:
            distance = tl.where(columns < row.V, distance, 0.0)
        logit_sum += tl.sum(distance, axis=1)
    return State(
        student_max,
        student_total,
        teacher_max,
        teacher_total,
        total_at_one,
        ratio_sum,
        full_max,
        full_total,
        logit_sum,
    )


# What `save_totals` keeps of a row, for the launch that writes the gradient.
ROW_STATE = 11


@triton.jit
def save_totals(state_ptr, stride, totals, ce_reference, ce_inverse, DIVERGENCE: tl.constexpr):
    """Keep the statistics of a row and the reference and sum of its cross entropy."""
    tl.store(state_ptr, totals.student_reference)
    tl.store(state_ptr + stride, totals.student_inverse)
    tl.store(state_ptr + 2 * stride, totals.student_log)
    tl.store(state_ptr + 3 * stride, totals.teacher_reference)
    tl.store(state_ptr + 4 * stride, totals.teacher_inverse)
    tl.store(state_ptr + 5 * stride, totals.teacher_log)
    tl.store(state_ptr + 6 * stride, totals.log_partition_ratio)
    tl.store(state_ptr + 7 * stride, totals.mean)
    if DIVERGENCE == "skew_kl":
        tl.store(state_ptr + 8 * stride, tl.where(totals.far, 1.0, 0.0))
    elif DIVERGENCE == "renyi":
        tl.store(state_ptr + 8 * stride, totals.far)
    tl.store(state_ptr + 9 * stride, ce_reference)
    tl.store(state_ptr + 10 * stride, ce_inverse)


@triton.jit
def load_totals(state_ptr, stride, DIVERGENCE: tl.constexpr):
    """What `save_totals` kept."""
    far = False
    if DIVERGENCE == "skew_kl":
        far = tl.load(state_ptr + 8 * stride) != 0.0
    elif DIVERGENCE == "renyi":
        far = tl.load(state_ptr + 8 * stride)
    totals = Totals(
        tl.load(state_ptr),
        tl.load(state_ptr + stride),
        tl.load(state_ptr + 2 * stride),
        tl.load(state_ptr + 3 * stride),
        tl.load(state_ptr + 4 * stride),
        tl.load(state_ptr + 5 * stride),
        tl.load(state_ptr + 6 * stride),
        tl.load(state_ptr + 7 * stride),
        far,
    )
    return totals, tl.load(state_ptr + 9 * stride), tl.load(state_ptr + 10 * stride)


@triton.jit
def new_totals(student_reference, student_total, teacher_reference, teacher_total, DIVERGENCE: tl.constexpr):
    """The statistics of a row from its sums, <f> not known."""
    student_inverse = 1.0 / student_total
    teacher_inverse = 1.0 / teacher_total
    log_partition_ratio = tl.log2(student_total / teacher_total)
    if DIVERGENCE == "decoupled":  # of a side that is certain of the label, nothing is left for the others
        student_inverse = tl.where(student_total == 0.0, 0.0, student_inverse)
        teacher_inverse = tl.where(teacher_total == 0.0, 0.0, teacher_inverse)
        log_partition_ratio = tl.where(
            (student_total == 0.0) | (teacher_total == 0.0), 0.0, log_partition_ratio
        )
    return Totals(
        student_reference,
        student_inverse,
        tl.log2(student_total),
        teacher_reference,
        teacher_inverse,
        tl.log2(teacher_total),
        log_partition_ratio,
        0.0,
        False,
    )


@triton.jit
def with_mean(totals, mean, uncentred_mean, first, DIVERGENCE: tl.constexpr):
    """The same statistics with <f> known."""
    far = False
    if DIVERGENCE == "skew_kl":
        far = mean > 0.5 * (1.0 - first)
        mean = tl.where(far, uncentred_mean, mean)
    elif DIVERGENCE == "renyi":
        far = 1.0 / uncentred_mean
    elif DIVERGENCE == "tvd":
        mean = mean / uncentred_mean
    return Totals(
        totals.student_reference,
        totals.student_inverse,
        totals.student_log,
        totals.teacher_reference,
        totals.teacher_inverse,
        totals.teacher_log,
        totals.log_partition_ratio,
        mean,
        far,
    )


@triton.jit
def join_statistics(state, numbers, FLAGS: tl.constexpr):
    """The statistics of the whole row, with <f> where it was summed up online."""
    student_reference, student_total = join_lanes(state.student_max, state.student_total, numbers.scale)
    teacher_reference, teacher_total = join_lanes(state.teacher_max, state.teacher_total, numbers.scale)
    totals = new_totals(
        student_reference, student_total, teacher_reference, teacher_total, tl.constexpr(FLAGS.divergence)
    )
    ratio_sum = ratio_move(
        state.ratio_sum,
        state.student_total,
        tl.exp2((state.student_max - student_reference) * numbers.scale),
        finite_or_zero(state.student_max) - student_reference,
        finite_or_zero(state.teacher_max) - teacher_reference,
        tl.constexpr(FLAGS.divergence),
    )
    mean = mean_slope(
        tl.sum(ratio_sum, axis=0),
        totals.log_partition_ratio,
        totals.student_inverse,
        numbers.inverse_temperature,
        tl.constexpr(FLAGS.divergence),
    )
    if FLAGS.divergence == "reverse_kl":
        totals = with_mean(totals, mean, mean, numbers.first, tl.constexpr(FLAGS.divergence))
    return totals


@triton.jit
def first_pass(row, numbers, pivot, tile, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The statistics of a row, still by lane.

    From the last tile to the first where the next pass is the last: that one has to ascend, and finds the first tiles still in
    cache. Before a pass over the mixture, which itself descends, it ascends.
    """
    full_blocks = row.shared // BLOCK
    state = new_state(LANES)
    if full_blocks * BLOCK < row.V:
        columns = full_blocks * BLOCK + tile
        pair = load_pair(row, columns, FLAGS, True)
        state = statistics_step(state, pair, columns, row, numbers, pivot, FLAGS, True)
    if FLAGS.vocab_map == "prefix":
        for block in range(full_blocks + 1, tl.cdiv(row.V, BLOCK)):
            columns = block * BLOCK + tile
            pair = load_pair(row, columns, FLAGS, True)
            state = statistics_step(state, pair, columns, row, numbers, pivot, FLAGS, True)
    for step in range(full_blocks):
        columns = (step if FLAGS.needs_mean_pass else full_blocks - 1 - step) * BLOCK + tile
        pair = load_pair(row, columns, FLAGS, False)
        state = statistics_step(state, pair, columns, row, numbers, pivot, FLAGS, False)
    return state


@triton.jit
def tile_ratios(pair, totals, scale):
    """Distributions and log-ratios of one tile, and the student's logits shifted by their reference."""
    student_shifted = pair.student - totals.student_reference
    teacher_shifted = pair.teacher - totals.teacher_reference
    return Ratios(
        tl.exp2(student_shifted * scale) * totals.student_inverse,
        tl.exp2(teacher_shifted * scale) * totals.teacher_inverse,
        (student_shifted - teacher_shifted) * scale - totals.log_partition_ratio,
        student_shifted * scale - totals.student_log,
        teacher_shifted * scale - totals.teacher_log,
    )
