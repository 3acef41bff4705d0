"""The work on a row split over tiles of the vocabulary, for logits that never exist as whole rows.

The same passes as in `rows.py`, over the columns of one tile; what a row is known by between tiles is in
`core/row_state.py`. <f> of every divergence comes from a pass of its own here, so nothing is summed online.
"""

import triton
import triton.language as tl

from ...core import row_state
from ..numeric import LOG2_E, finite_or_zero, rescaled, softmax_step, store_tile, write_zeros
from .labels import decoupled_parts, student_label, teacher_label
from .online import first_pass, new_totals, with_mean
from .passes import GradientFactors, RowScalars, ce_slope, last_pass, sums_pass
from .row import LogitRow, Row, chain_factor, load_logits

STUDENT_MAX = tl.constexpr(row_state.STUDENT_MAX)
STUDENT_SUM = tl.constexpr(row_state.STUDENT_SUM)
TEACHER_MAX = tl.constexpr(row_state.TEACHER_MAX)
TEACHER_SUM = tl.constexpr(row_state.TEACHER_SUM)
CE_MAX = tl.constexpr(row_state.CE_MAX)
CE_SUM = tl.constexpr(row_state.CE_SUM)
LABEL = tl.constexpr(row_state.LABEL)
TEACHER_LABEL = tl.constexpr(row_state.TEACHER_LABEL)
LOGIT_SUM = tl.constexpr(row_state.LOGIT_SUM)
VALUE = tl.constexpr(row_state.VALUE)
MEAN = tl.constexpr(row_state.MEAN)
UNCENTRED_MEAN = tl.constexpr(row_state.UNCENTRED_MEAN)


@triton.jit
def _merge(state_ptr, stride, max_slot, sum_slot, maximum, total, scale):
    """Take the (maximum, sum) of every lane of a tile into two slots."""
    old_maximum = tl.load(state_ptr + max_slot * stride)
    old_total = tl.load(state_ptr + sum_slot * stride)
    tl.debug_barrier()  # all threads have read what one of them writes
    next_maximum = tl.maximum(old_maximum, tl.max(maximum, axis=0))
    reference = finite_or_zero(next_maximum)
    tl.store(state_ptr + max_slot * stride, next_maximum)
    tl.store(
        state_ptr + sum_slot * stride,
        rescaled(old_total, old_maximum, reference, scale)
        + tl.sum(rescaled(total, maximum, reference, scale), axis=0),
    )


@triton.jit
def _add(state_ptr, stride, slot, value):
    old = tl.load(state_ptr + slot * stride)
    tl.debug_barrier()  # as in `_merge`
    tl.store(state_ptr + slot * stride, old + value)


@triton.jit
def _student_pass(row, tile, FLAGS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Statistics of a tile that the teacher has no part in: the cross entropy's, and the sum of the logits."""
    maximum = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    logit_sum = total
    for block in range(tl.cdiv(row.V, BLOCK)):
        columns = block * BLOCK + tile
        inside = columns < row.V
        logits = load_logits(
            row.student, columns, inside, FLAGS.has_student_bias, tl.constexpr(FLAGS.student_transform)
        )
        maximum, total, _ = softmax_step(maximum, total, logits, LOG2_E)
        if FLAGS.has_smoothing:
            logit_sum += tl.sum(tl.where(inside, logits, 0.0), axis=1)
    return maximum, total, logit_sum


@triton.jit
def _student_gradient(row, grad_row, slopes, tile, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of such a tile: the cross entropy's."""
    for block in range(tl.cdiv(row.V, BLOCK)):
        columns = block * BLOCK + tile
        logits = load_logits(
            row.student,
            columns,
            columns < row.V,
            FLAGS.has_student_bias,
            tl.constexpr(FLAGS.student_transform),
        )
        p = tl.exp2((logits - slopes.ce_reference) * LOG2_E) * slopes.ce_inverse
        gradient = ce_slope(p, columns, row, slopes, FLAGS.has_smoothing)
        if FLAGS.student_transform != "none":
            gradient *= chain_factor(logits, row.student, tl.constexpr(FLAGS.student_transform))
        if FLAGS.aliased:
            tl.debug_barrier()  # as in `passes.last_step`
        store_tile(grad_row, columns, gradient, row.V, True)


@triton.jit
def _statistics(row, label, state_ptr, stride, numbers, tile, FLAGS, BLOCK, LANES, HAS_TEACHER: tl.constexpr):
    """Merge the tile into the first nine slots."""
    if HAS_TEACHER:
        state = first_pass(row, numbers, 0.0, tile, FLAGS, BLOCK, LANES)
        full_max = state.full_max
        full_total = state.full_total
        logit_sum = state.logit_sum
        _merge(
            state_ptr, stride, STUDENT_MAX, STUDENT_SUM, state.student_max, state.student_total, numbers.scale
        )
        _merge(
            state_ptr, stride, TEACHER_MAX, TEACHER_SUM, state.teacher_max, state.teacher_total, numbers.scale
        )
    else:
        full_max, full_total, logit_sum = _student_pass(row, tile, FLAGS, BLOCK, LANES)
    if FLAGS.has_ce:
        _merge(state_ptr, stride, CE_MAX, CE_SUM, full_max, full_total, LOG2_E)
    if FLAGS.has_smoothing:
        _add(state_ptr, stride, LOGIT_SUM, tl.sum(logit_sum, axis=0))
    if FLAGS.has_labels:
        here = label >= 0
        tl.store(state_ptr + LABEL * stride, student_label(row, label, here, FLAGS), mask=here)
        if FLAGS.divergence == "decoupled":
            teacher_logit = float("inf")  # not shared
            if HAS_TEACHER:
                teacher_logit, _ = teacher_label(row, label, here, FLAGS)
            tl.store(state_ptr + TEACHER_LABEL * stride, teacher_logit, mask=here)


@triton.jit
def _totals(state_ptr, stride, FLAGS):
    """The statistics of a row whose tiles were all seen."""
    return new_totals(
        finite_or_zero(tl.load(state_ptr + STUDENT_MAX * stride)),
        tl.load(state_ptr + STUDENT_SUM * stride),
        finite_or_zero(tl.load(state_ptr + TEACHER_MAX * stride)),
        tl.load(state_ptr + TEACHER_SUM * stride),
        tl.constexpr(FLAGS.divergence),
    )


@triton.jit
def _add_value(state_ptr, stride, totals, value, FLAGS: tl.constexpr):
    """Add a tile's part of the value."""
    if FLAGS.divergence == "decoupled":
        # A teacher that is certain of the label has no rest to be near to.
        value = tl.where(totals.teacher_inverse == 0.0, 0.0, value)
    _add(state_ptr, stride, VALUE, value)


@triton.jit
def _label_parts(state_ptr, stride, totals, target, non_target, numbers):
    """Of a decoupled row: the target weight times p_t - p_s of the label, and the weight of the rest."""
    label_logit = tl.load(state_ptr + LABEL * stride)
    teacher_logit = tl.load(state_ptr + TEACHER_LABEL * stride)
    apart = teacher_logit == float("inf")
    label_logit = tl.where(apart, float("-inf"), label_logit)
    teacher_logit = tl.where(apart, float("-inf"), teacher_logit)
    _, difference, rest = decoupled_parts(
        label_logit, teacher_logit, totals, target, non_target, numbers.scale
    )
    return difference, rest


@triton.jit
def _gradient(
    row, grad_row, state_ptr, stride, numbers, weights, target_ptr, non_target_ptr, tile, FLAGS, BLOCK, LANES,
    HAS_TEACHER: tl.constexpr, ADD_VALUE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the tile, and add its part of the value where that is not known yet."""
    kd_weight, ce_weight, smoothing, uniform = weights
    ce_reference = 0.0
    ce_inverse = 0.0
    if FLAGS.has_ce:
        ce_reference = finite_or_zero(tl.load(state_ptr + CE_MAX * stride))
        ce_inverse = 1.0 / tl.load(state_ptr + CE_SUM * stride)
    if HAS_TEACHER:
        totals = _totals(state_ptr, stride, FLAGS)
        totals = with_mean(
            totals,
            tl.load(state_ptr + MEAN * stride),
            tl.load(state_ptr + UNCENTRED_MEAN * stride),
            numbers.first,
            tl.constexpr(FLAGS.divergence),
        )
        label_difference = 0.0
        rest = 1.0
        if FLAGS.divergence == "decoupled":
            label_difference, rest = _label_parts(
                state_ptr, stride, totals, tl.load(target_ptr), tl.load(non_target_ptr), numbers
            )
        slopes = GradientFactors(
            kd_weight, ce_weight, smoothing, uniform, ce_reference, ce_inverse, label_difference, rest
        )
        value = last_pass(row, grad_row, numbers, totals, slopes, tile, FLAGS, BLOCK, LANES)
        if ADD_VALUE:
            _add_value(state_ptr, stride, totals, value, FLAGS)
    else:
        slopes = GradientFactors(kd_weight, ce_weight, smoothing, uniform, ce_reference, ce_inverse, 0.0, 0.0)
        _student_gradient(row, grad_row, slopes, tile, FLAGS, BLOCK)


# Pointers to one number a row: slices of them start anywhere.
_SCALARS = ["labels_ptr", "target_ptr", "non_target_ptr", "row_weight_ptr", "state_ptr"]


# Neither a last chunk of fewer rows nor the place of a tile or a chunk recompiles.
@triton.jit(
    do_not_specialize=["stride_state_row", "offset"],
    do_not_specialize_on_alignment=_SCALARS,
)
def _tile_kernel(
    student_ptr,  # (R, C) columns of the tile
    teacher_ptr,  # (R, C), read when HAS_TEACHER
    labels_ptr,  # (R,) int64 of the whole vocabulary, read when has_labels
    student_bias_ptr,  # (C,)
    teacher_bias_ptr,  # (C,)
    target_ptr,  # (R,) fp32, weights of the decoupled divergence
    non_target_ptr,  # (R,) fp32
    row_weight_ptr,  # (R,) fp32
    grad_ptr,  # (R, C), written by the gradient; may share memory with student_ptr
    state_ptr,  # (SLOTS, R) fp32, read and written
    stride_student_row,
    stride_teacher_row,
    stride_grad_row,
    stride_state_row,
    C,
    offset,  # first column of the tile
    inverse_temperature,
    first,
    second,
    kd_scale,
    ce_weight,
    label_smoothing,
    uniform,  # label_smoothing / V
    student_slope,
    student_softcap,
    teacher_slope,
    teacher_softcap,
    PASS: tl.constexpr,  # "statistics", "sums" or "gradient"
    HAS_TEACHER: tl.constexpr,
    ADD_VALUE: tl.constexpr,  # the gradient pass adds the value too
    FLAGS: tl.constexpr,  # RowFlags
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row_index = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    grad_row = grad_ptr + row_index * stride_grad_row
    weight = 1.0
    if FLAGS.has_row_weight:
        weight = tl.load(row_weight_ptr + row_index)
        if weight == 0.0:  # nothing of the row is read
            if PASS == "gradient":
                write_zeros(grad_row, C, tile, BLOCK)
            return
    label = tl.full((), -1, tl.int64)
    if FLAGS.has_labels:
        label = tl.load(labels_ptr + row_index) - offset
        label = tl.where((label >= 0) & (label < C), label, -1)
    student_row = student_ptr + row_index * stride_student_row
    teacher_row = teacher_ptr + row_index * stride_teacher_row
    student = LogitRow(student_row, student_bias_ptr, student_slope, student_softcap)
    teacher = LogitRow(teacher_row, teacher_bias_ptr, teacher_slope, teacher_softcap)
    row = Row(student, teacher, labels_ptr, C, C, C, label.to(tl.int32))
    numbers = RowScalars(inverse_temperature * LOG2_E, inverse_temperature, first, second)
    state_ptr += row_index
    if PASS == "statistics":
        _statistics(row, label, state_ptr, stride_state_row, numbers, tile, FLAGS, BLOCK, LANES, HAS_TEACHER)
    elif PASS == "sums":
        totals = _totals(state_ptr, stride_state_row, FLAGS)
        value, mean, uncentred_mean = sums_pass(row, numbers, totals, tile, FLAGS, BLOCK, LANES)
        _add_value(state_ptr, stride_state_row, totals, value, FLAGS)
        _add(state_ptr, stride_state_row, MEAN, mean)
        _add(state_ptr, stride_state_row, UNCENTRED_MEAN, uncentred_mean)
    else:
        weights = (weight * kd_scale * inverse_temperature, weight * ce_weight, label_smoothing, uniform)
        _gradient(
            row, grad_row, state_ptr, stride_state_row, numbers, weights, target_ptr + row_index, non_target_ptr + row_index,
            tile, FLAGS, BLOCK, LANES, HAS_TEACHER, ADD_VALUE,
        )  # fmt: skip
