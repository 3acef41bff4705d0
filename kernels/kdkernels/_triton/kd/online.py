"""The first pass over a row: online maxima and sums of both sides, per lane, joined once at its end."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..numeric import LOG2_E, finite_or_zero, join_lanes, softmax_step, sum_at_one_step, times_unless_zero
from .divergence import Ratios, mean_slope, ratio_move, ratio_step
from .row import load_logits, load_pair


class Own(NamedTuple):
    """A model's own distribution at temperature 1, over all of its columns."""

    maximum: Any
    total: Any
    weighted: Any  # sum of exp(shifted logit) * shifted logit, for the entropy
    best: Any  # int32, the first column of the maximum


class State(NamedTuple):
    """What the first pass carries, each (LANES,); what its flags leave unused stays as it is and costs nothing."""

    student_max: Any
    student_total: Any
    teacher_max: Any
    teacher_total: Any
    total_at_one: Any  # the student's at temperature 1, from the same maximum
    ratio_sum: Any
    student_own: Own
    teacher_own: Own
    logit_sum: Any  # of the student's logits, measured from `pivot`


class Totals(NamedTuple):
    """The statistics of a row, scalars. Sums are of 2**((logit - reference) * scale)."""

    student_reference: Any
    student_inverse: Any  # 1 / sum
    student_log: Any  # log2(sum)
    teacher_reference: Any
    teacher_inverse: Any
    teacher_log: Any
    log_sum_gap: Any  # log2 of the quotient of both sums
    mean: Any  # <f>, where it is known by now
    far: Any  # whether it leaves out the constant of f (skew KL); 1 / sum of the products (Rényi)


@triton.jit
def new_own(LANES: tl.constexpr):
    """Nothing seen yet."""
    nothing = tl.zeros((LANES,), tl.float32)
    return Own(
        tl.full((LANES,), float("-inf"), tl.float32),
        nothing,
        nothing,
        tl.full((LANES,), 2147483647, tl.int32),
    )


@triton.jit
def new_state(LANES: tl.constexpr):
    """Nothing seen yet."""
    lowest = tl.full((LANES,), float("-inf"), tl.float32)
    nothing = tl.zeros((LANES,), tl.float32)
    own = new_own(LANES)
    return State(lowest, nothing, lowest, nothing, nothing, nothing, own, own, nothing)


@triton.jit
def own_step(own, logits, columns, HAS_STATS: tl.constexpr):
    """Take one tile of a model's own columns."""
    maximum, total, shifted = softmax_step(own.maximum, own.total, logits, LOG2_E)
    weighted = own.weighted
    best = own.best
    if HAS_STATS:
        reference = finite_or_zero(maximum)
        rescale = tl.exp2((own.maximum - reference) * LOG2_E)
        moved = weighted + times_unless_zero(own.total, finite_or_zero(own.maximum) - reference)
        weighted = times_unless_zero(rescale, moved)
        weighted += tl.sum(times_unless_zero(tl.exp2(shifted * LOG2_E), shifted), axis=1)
        tile_max = tl.max(logits, axis=1)
        first = tl.min(tl.where(logits == tile_max[:, None], columns, 2147483647), axis=1)
        tied = tl.where(tile_max == own.maximum, tl.minimum(first, best), best)
        best = tl.where(tile_max > own.maximum, first, tied)
    return Own(maximum, total, weighted, best)


@triton.jit
def own_join(own):
    """Of a whole row: its maximum or 0, its sum, the entropy in nats and the first column of the maximum."""
    reference, total = join_lanes(own.maximum, own.total, LOG2_E)
    rescale = tl.exp2((own.maximum - reference) * LOG2_E)
    moved = own.weighted + times_unless_zero(own.total, finite_or_zero(own.maximum) - reference)
    entropy = tl.log(total) - tl.sum(times_unless_zero(rescale, moved), axis=0) / total
    best = tl.min(tl.where(own.maximum == tl.max(own.maximum, axis=0), own.best, 2147483647), axis=0)
    return reference, total, entropy, best


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
    student_own = state.student_own
    teacher_own = state.teacher_own
    if FLAGS.ce_sum == "own":
        student_own = own_step(student_own, tile.student_own, columns, FLAGS.has_stats)
    if FLAGS.has_stats and FLAGS.vocab_map != "index":
        teacher_own = own_step(teacher_own, tile.teacher_own, columns, True)
    logit_sum = state.logit_sum
    if FLAGS.has_smoothing:
        distance = tile.student_own - pivot
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
        student_own,
        teacher_own,
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
    tl.store(state_ptr + 6 * stride, totals.log_sum_gap)
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
    log_sum_gap = tl.log2(student_total / teacher_total)
    if DIVERGENCE == "decoupled":  # of a side that is certain of the label, nothing is left for the others
        student_inverse = tl.where(student_total == 0.0, 0.0, student_inverse)
        teacher_inverse = tl.where(teacher_total == 0.0, 0.0, teacher_inverse)
        log_sum_gap = tl.where((student_total == 0.0) | (teacher_total == 0.0), 0.0, log_sum_gap)
    return Totals(
        student_reference,
        student_inverse,
        tl.log2(student_total),
        teacher_reference,
        teacher_inverse,
        tl.log2(teacher_total),
        log_sum_gap,
        0.0,
        False,
    )


@triton.jit
def with_mean(totals, mean, far_mean, first, DIVERGENCE: tl.constexpr):
    """The same statistics with <f> known."""
    far = False
    if DIVERGENCE == "skew_kl":
        far = mean > 0.5 * (1.0 - first)
        mean = tl.where(far, far_mean, mean)
    elif DIVERGENCE == "renyi":
        far = 1.0 / far_mean
    elif DIVERGENCE == "tvd":
        mean = mean / far_mean
    return Totals(
        totals.student_reference,
        totals.student_inverse,
        totals.student_log,
        totals.teacher_reference,
        totals.teacher_inverse,
        totals.teacher_log,
        totals.log_sum_gap,
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
        totals.log_sum_gap,
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
    last = row.V
    if FLAGS.has_stats and FLAGS.vocab_map == "prefix":
        last = tl.maximum(row.V, row.V_teacher)
    state = new_state(LANES)
    if full_blocks * BLOCK < last:
        columns = full_blocks * BLOCK + tile
        pair = load_pair(row, columns, FLAGS, True)
        state = statistics_step(state, pair, columns, row, numbers, pivot, FLAGS, True)
    if FLAGS.vocab_map == "prefix":
        for block in range(full_blocks + 1, tl.cdiv(last, BLOCK)):
            columns = block * BLOCK + tile
            pair = load_pair(row, columns, FLAGS, True)
            state = statistics_step(state, pair, columns, row, numbers, pivot, FLAGS, True)
    for step in range(full_blocks):
        columns = (step if FLAGS.mixture else full_blocks - 1 - step) * BLOCK + tile
        pair = load_pair(row, columns, FLAGS, False)
        state = statistics_step(state, pair, columns, row, numbers, pivot, FLAGS, False)
    return state


@triton.jit
def teacher_pass(row, tile, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The teacher's own distribution under an index map, which visits its columns out of order and not all of them."""
    own = new_own(LANES)
    for block in range(tl.cdiv(row.V_teacher, BLOCK)):
        columns = block * BLOCK + tile
        logits = load_logits(
            row.teacher,
            columns,
            columns < row.V_teacher,
            FLAGS.has_teacher_bias,
            tl.constexpr(FLAGS.teacher_transform),
        )
        own = own_step(own, logits, columns, True)
    return own


@triton.jit
def tile_ratios(pair, totals, scale):
    """Distributions and log-ratios of one tile, and the student's logits shifted by their reference."""
    student_shifted = pair.student - totals.student_reference
    teacher_shifted = pair.teacher - totals.teacher_reference
    return Ratios(
        tl.exp2(student_shifted * scale) * totals.student_inverse,
        tl.exp2(teacher_shifted * scale) * totals.teacher_inverse,
        (student_shifted - teacher_shifted) * scale - totals.log_sum_gap,
        student_shifted * scale - totals.student_log,
        teacher_shifted * scale - totals.teacher_log,
    )
