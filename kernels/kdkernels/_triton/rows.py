"""Row kernel of the divergences: values of a row of student and teacher logits, and the gradient written in place.

Passes over a row of V logits on both sides: statistics (online maximum and sum; for reverse KL also the mean log-ratio),
for JSD its value and mean log-ratio, and last the gradient together with the value of forward and reverse KL.
Bytes moved per logit: 2 x (student + teacher) reads + 1 gradient write, 3 x for JSD: 18 and 26 with fp32 logits and a
half gradient, 10 and 14 with half logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..divergences import JSD, BuiltDivergence, ForwardKL, ReverseKL
from ..options import RowTerms
from .configs import RowConfig, architecture_of, device_guard, launch_options, row_config
from .numeric import (
    LN_2,
    LOG2_E,
    finite_or_zero,
    join_lanes,
    load_tile,
    softmax_step,
    store_tile,
    times_unless_zero,
)

KERNEL_NAMES: dict[type[BuiltDivergence], str] = {
    ForwardKL: "forward_kl",
    ReverseKL: "reverse_kl",
    JSD: "jsd",
}


@triton.jit
def _statistics_step(state, student, teacher, scale, DIVERGENCE: tl.constexpr, CE_AT_ONE: tl.constexpr):
    """Take one tile of both rows into the statistics of every lane, each (LANES,)."""
    student_max, student_sum, student_sum_at_one, teacher_max, teacher_sum, ratio_sum = state
    next_student_max, next_student_sum, student_shifted = softmax_step(
        student_max, student_sum, student, scale
    )
    next_teacher_max, next_teacher_sum, teacher_shifted = softmax_step(
        teacher_max, teacher_sum, teacher, scale
    )
    if CE_AT_ONE:
        rescale = tl.exp2((student_max - finite_or_zero(next_student_max)) * LOG2_E)
        student_sum_at_one = student_sum_at_one * rescale + tl.sum(tl.exp2(student_shifted * LOG2_E), axis=1)
    if DIVERGENCE == "reverse_kl":
        # Sum of the student's exponentials times (student - teacher), both measured from their maxima so that an offset
        # between the rows costs no digits. When a maximum moves, so does the zero of the difference.
        student_move = finite_or_zero(student_max) - finite_or_zero(next_student_max)
        teacher_move = finite_or_zero(teacher_max) - finite_or_zero(next_teacher_max)
        moved = times_unless_zero(student_sum, student_move - teacher_move) + ratio_sum
        rescale = tl.exp2((student_max - finite_or_zero(next_student_max)) * scale)
        ratios = times_unless_zero(tl.exp2(student_shifted * scale), student_shifted - teacher_shifted)
        ratio_sum = times_unless_zero(rescale, moved) + tl.sum(ratios, axis=1)
    return (
        next_student_max,
        next_student_sum,
        student_sum_at_one,
        next_teacher_max,
        next_teacher_sum,
        ratio_sum,
    )


@triton.jit
def _probabilities(student, teacher, statistics, scale):
    """Both rows shifted by their maxima, both distributions, and log2(p_student / p_teacher).

    The log-ratio comes from the difference of the shifted logits, which is exact where they agree, and the
    probabilities from products: neither goes through a rounded logarithm of a probability.
    """
    student_reference, student_inverse, teacher_reference, teacher_inverse, log_sum_gap = statistics
    student_shifted = student - student_reference
    teacher_shifted = teacher - teacher_reference
    p_student = tl.exp2(student_shifted * scale) * student_inverse
    p_teacher = tl.exp2(teacher_shifted * scale) * teacher_inverse
    log_ratio = (student_shifted - teacher_shifted) * scale - log_sum_gap
    return student_shifted, teacher_shifted, p_student, p_teacher, log_ratio


@triton.jit
def _mixture_log_ratios(log_ratio, beta):
    """log2(p_student / m) and log2(p_teacher / m) for m = beta p_teacher + (1 - beta) p_student.

    Both from one logarithm, that of m over the larger of the two: a number between the larger's weight and 1, which
    neither overflows nor vanishes, and which keeps its digits where the rows agree.
    """
    smaller = tl.exp2(-tl.abs(log_ratio))
    share = tl.where(log_ratio < 0.0, beta + (1.0 - beta) * smaller, (1.0 - beta) + beta * smaller)
    larger_ratio = -tl.log2(share)
    return larger_ratio + tl.minimum(log_ratio, 0.0), larger_ratio - tl.maximum(log_ratio, 0.0)


@triton.jit
def _mixture_step(state, student, teacher, statistics, scale, beta):
    """Add one tile to the value of JSD and to the mean of log2(p_student / m) under the student, per lane."""
    value, ratio_mean = state
    _, _, p_student, p_teacher, log_ratio = _probabilities(student, teacher, statistics, scale)
    student_ratio, teacher_ratio = _mixture_log_ratios(log_ratio, beta)
    student_terms = times_unless_zero(p_student, student_ratio)
    teacher_terms = times_unless_zero(p_teacher, teacher_ratio)
    value += tl.sum(beta * teacher_terms + (1.0 - beta) * student_terms, axis=1)
    return value, ratio_mean + tl.sum(student_terms, axis=1)


@triton.jit
def _kl_terms(p, q, log_ratio):
    """p log(p/q) - p + q, whose sum over a row is KL(p || q), and q - p; log_ratio is log(q/p).

    The terms are >= 0 and vanish twice where p = q, so an error of the normalisers enters them squared. Near p = q a
    series keeps the digits that log(p/q) and q - p would lose: a divergence of 1e-9 is as exact as one of 1.
    """
    series = log_ratio * (1.0 / 5040.0) + 1.0 / 720.0
    series = log_ratio * (log_ratio * (log_ratio * series + 1.0 / 120.0) + 1.0 / 24.0) + 1.0 / 6.0
    series = p * (log_ratio * log_ratio * (log_ratio * series + 0.5))  # p (exp(log_ratio) - 1 - log_ratio)
    near = tl.abs(log_ratio) < 0.5
    difference = tl.where(near, p * log_ratio + series, q - p)
    return tl.where(near, series, difference - times_unless_zero(p, log_ratio)), difference


@triton.jit
def _divergence_terms(
    student, teacher, statistics, scale, ratio_mean, inverse_temperature, beta, DIVERGENCE: tl.constexpr
):
    """One tile: terms of the value (KL only), d(divergence)/d(logit / T), and the student shifted and as p."""
    student_shifted, teacher_shifted, p_student, p_teacher, log_ratio = _probabilities(
        student, teacher, statistics, scale
    )
    if DIVERGENCE == "forward_kl":
        terms, gradient = _kl_terms(p_teacher, p_student, log_ratio * LN_2)
    elif DIVERGENCE == "reverse_kl":
        terms, _ = _kl_terms(p_student, p_teacher, -log_ratio * LN_2)
        centred = (student_shifted - teacher_shifted - ratio_mean) * inverse_temperature
        gradient = times_unless_zero(p_student, centred)
    else:
        terms = p_student  # not used: the value is known from the pass before
        student_ratio, _ = _mixture_log_ratios(log_ratio, beta)
        gradient = times_unless_zero(p_student, (1.0 - beta) * LN_2 * (student_ratio - ratio_mean))
    return terms, gradient, student_shifted, p_student


@triton.jit
def _load_pair(
    rows, columns, V, HAS_STUDENT_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, MASKED: tl.constexpr
):
    """One tile of both rows."""
    student_row, student_bias_ptr, teacher_row, teacher_bias_ptr = rows
    student = load_tile(student_row, student_bias_ptr, columns, V, HAS_STUDENT_BIAS, MASKED)
    teacher = load_tile(teacher_row, teacher_bias_ptr, columns, V, HAS_TEACHER_BIAS, MASKED)
    return student, teacher


@triton.jit
def _last_step(
    value,  # (LANES,) sum of the terms so far
    rows,
    grad_row,
    columns,
    label,
    statistics,
    inverse_at_one,
    ratio_mean,
    factors,
    V,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    CE_AT_ONE: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    ALIASED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of the last pass: add the terms of the value and write the gradient."""
    scale, inverse_temperature, beta, kd_factor, ce_factor = factors
    student, teacher = _load_pair(rows, columns, V, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, MASKED)
    terms, gradient, student_shifted, p_student = _divergence_terms(
        student, teacher, statistics, scale, ratio_mean, inverse_temperature, beta, DIVERGENCE
    )
    if WRITE_GRAD:
        gradient *= kd_factor
        if HAS_LABELS:
            p_at_one = p_student
            if CE_AT_ONE:
                p_at_one = tl.exp2(student_shifted * LOG2_E) * inverse_at_one
            gradient += ce_factor * tl.where(columns == label, p_at_one - 1.0, p_at_one)
        if ALIASED:
            # Tile i of the gradient lies over logits of tile i // 2. All warps have read as far as i before one writes,
            # and the tiles ascend, so nothing is overwritten that is still to be read.
            tl.debug_barrier()
        store_tile(grad_row, columns, gradient, V, MASKED)
    return value + tl.sum(terms, axis=1)


@triton.jit
def _kd_rows_kernel(
    student_ptr,  # (R, V)
    teacher_ptr,  # (R, V)
    labels_ptr,  # (R,) int64, read when HAS_LABELS and the row's weight is not 0
    student_bias_ptr,  # (V,)
    teacher_bias_ptr,  # (V,)
    row_weight_ptr,  # (R,) fp32
    grad_ptr,  # (R, V), may share memory with student_ptr
    kd_ptr,  # (R,) fp32, written
    ce_ptr,  # (R,) fp32, written
    stride_student_row,
    stride_teacher_row,
    stride_grad_row,
    V,
    inverse_temperature,
    kd_scale,
    ce_weight,
    beta,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    CE_AT_ONE: tl.constexpr,  # CE is on and the temperature is not 1, so its normaliser is a sum of its own
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    ALIASED: tl.constexpr,  # grad holds narrower numbers in the student's own row
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    student_row = student_ptr + row * stride_student_row
    teacher_row = teacher_ptr + row * stride_teacher_row
    grad_row = grad_ptr + row * stride_grad_row
    rows = (student_row, student_bias_ptr, teacher_row, teacher_bias_ptr)
    full_blocks = V // BLOCK
    tail = full_blocks * BLOCK

    weight = 1.0
    if HAS_ROW_WEIGHT:
        weight = tl.load(row_weight_ptr + row)
        if weight == 0.0:  # nothing of the row is read: neither its logits nor its label need be valid
            tl.store(kd_ptr + row, 0.0)
            tl.store(ce_ptr + row, 0.0)
            if WRITE_GRAD:
                zeros = tl.zeros((LANES, WIDTH), tl.float32)
                for block in range(full_blocks):
                    store_tile(grad_row, block * BLOCK + tile, zeros, V, False)
                if tail < V:
                    store_tile(grad_row, tail + tile, zeros, V, True)
            return

    label = -1
    label_logit = 0.0
    if HAS_LABELS:
        # A label out of range reads nothing, and its row becomes NaN: checking it on the host would wait for the device.
        label = tl.load(labels_ptr + row)
        valid = (label >= 0) & (label < V)
        label_logit = tl.load(student_row + label, mask=valid, other=float("nan")).to(tl.float32)
        if HAS_STUDENT_BIAS:
            label_logit += tl.load(student_bias_ptr + label, mask=valid, other=0.0).to(tl.float32)
        ce_weight = tl.where(valid, ce_weight, float("nan"))
        label = label.to(tl.int32)

    # Pass 1, from the last tile to the first: the last pass has to ascend and finds the first tiles still in cache.
    scale = inverse_temperature * LOG2_E
    lowest = tl.full((LANES,), float("-inf"), tl.float32)
    nothing = tl.zeros((LANES,), tl.float32)
    state = (lowest, nothing, nothing, lowest, nothing, nothing)
    if tail < V:
        student, teacher = _load_pair(rows, tail + tile, V, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, True)
        state = _statistics_step(state, student, teacher, scale, DIVERGENCE, CE_AT_ONE)
    for block in range(full_blocks):
        columns = (full_blocks - 1 - block) * BLOCK + tile
        student, teacher = _load_pair(rows, columns, V, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, False)
        state = _statistics_step(state, student, teacher, scale, DIVERGENCE, CE_AT_ONE)
    student_max, student_sum, student_sum_at_one, teacher_max, teacher_sum, ratio_sum = state
    student_reference, student_total = join_lanes(student_max, student_sum, scale)
    teacher_reference, teacher_total = join_lanes(teacher_max, teacher_sum, scale)
    log_sum_gap = tl.log2(student_total / teacher_total)
    statistics = (student_reference, 1.0 / student_total, teacher_reference, 1.0 / teacher_total, log_sum_gap)

    ce = 0.0
    inverse_at_one = 0.0
    if HAS_LABELS:
        total_at_one = student_total
        if CE_AT_ONE:
            _, total_at_one = join_lanes(student_max, student_sum_at_one, LOG2_E)
        inverse_at_one = 1.0 / total_at_one
        ce = tl.log2(total_at_one) * LN_2 - (label_logit - student_reference)

    ratio_mean = 0.0
    if DIVERGENCE == "reverse_kl":
        student_shift = finite_or_zero(student_max) - student_reference
        teacher_shift = finite_or_zero(teacher_max) - teacher_reference
        moved = times_unless_zero(student_sum, student_shift - teacher_shift) + ratio_sum
        rescale = tl.exp2((student_max - student_reference) * scale)
        ratio_mean = tl.sum(times_unless_zero(rescale, moved), axis=0) / student_total
    elif DIVERGENCE == "jsd":
        sums = (nothing, nothing)
        for block in range(full_blocks):
            columns = block * BLOCK + tile
            student, teacher = _load_pair(rows, columns, V, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, False)
            sums = _mixture_step(sums, student, teacher, statistics, scale, beta)
        if tail < V:
            student, teacher = _load_pair(rows, tail + tile, V, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, True)
            sums = _mixture_step(sums, student, teacher, statistics, scale, beta)
        value, ratio = sums
        tl.store(kd_ptr + row, tl.sum(value, axis=0) * LN_2)
        ratio_mean = tl.sum(ratio, axis=0)

    if WRITE_GRAD or DIVERGENCE != "jsd":
        kd_factor = weight * kd_scale * inverse_temperature
        factors = (scale, inverse_temperature, beta, kd_factor, weight * ce_weight)
        value = nothing
        for block in range(full_blocks):
            value = _last_step(
                value,
                rows,
                grad_row,
                block * BLOCK + tile,
                label,
                statistics,
                inverse_at_one,
                ratio_mean,
                factors,
                V,
                DIVERGENCE,
                HAS_LABELS,
                CE_AT_ONE,
                HAS_STUDENT_BIAS,
                HAS_TEACHER_BIAS,
                WRITE_GRAD,
                ALIASED,
                False,
            )
        if tail < V:
            value = _last_step(
                value,
                rows,
                grad_row,
                tail + tile,
                label,
                statistics,
                inverse_at_one,
                ratio_mean,
                factors,
                V,
                DIVERGENCE,
                HAS_LABELS,
                CE_AT_ONE,
                HAS_STUDENT_BIAS,
                HAS_TEACHER_BIAS,
                WRITE_GRAD,
                ALIASED,
                True,
            )
        if DIVERGENCE != "jsd":
            tl.store(kd_ptr + row, tl.sum(value, axis=0))
    tl.store(ce_ptr + row, ce)


def kd_rows(
    student_logits: Tensor,  # (R, V)
    teacher_logits: Tensor,  # (R, V)
    labels: Tensor | None,  # (R,) int64
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    row_weight: Tensor | None = None,  # (R,)
    grad: Tensor | None = None,  # (R, V)
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:  # (R,) fp32, (R,) fp32
    """Divergence and cross entropy of every row, and row_weight * d(row loss)/d(student_logits) written into `grad`.

    Logits are fp16, bf16 or fp32 on either side, the last axis contiguous; everything is computed in fp32 and rounded
    once to the dtype of `grad`. `grad` may be `student_logits` itself or a narrower view of the same rows, such as the
    (R, 2V) half view of an fp32 buffer cut to V columns: the row is overwritten behind what has been read.
    Rows of weight 0 are not read; their values are 0 and their gradient is exactly 0.
    Both values come back without their weights and without T squared; CE is 0 where `ce_weight` is. `config` replaces the table's configuration.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits.dtype == torch.float64:
            raise ValueError(
                f"the triton back end computes in float32, got {name} in float64; use impl='torch' there"
            )
    rows, vocabulary = student_logits.shape
    kd = torch.empty(rows, dtype=torch.float32, device=student_logits.device)
    ce = torch.empty_like(kd)
    if rows == 0:
        return kd, ce
    written = student_logits if grad is None else grad
    aliased = (
        written.data_ptr() == student_logits.data_ptr()
        and written.element_size() < student_logits.element_size()
    )
    if (
        aliased
        and written.stride(0) * written.element_size()
        != student_logits.stride(0) * student_logits.element_size()
    ):
        raise ValueError(
            f"grad shares memory with student_logits, so its rows must start where theirs do; got row strides of "
            f"{written.stride(0) * written.element_size()} and "
            f"{student_logits.stride(0) * student_logits.element_size()} bytes"
        )
    if config is None:
        config = row_config(architecture_of(student_logits.device))
    divergence = terms.divergence
    with_ce = labels is not None and terms.ce_weight != 0.0
    with device_guard(student_logits.device):
        _kd_rows_kernel[(rows,)](
            student_ptr=student_logits,
            teacher_ptr=teacher_logits,
            # A pointer that its flag leaves unread is given the logits, so that one signature serves all.
            labels_ptr=student_logits if labels is None else labels.contiguous(),
            student_bias_ptr=student_logits if student_bias is None else student_bias.contiguous(),
            teacher_bias_ptr=student_logits if teacher_bias is None else teacher_bias.contiguous(),
            row_weight_ptr=student_logits if row_weight is None else row_weight.contiguous(),
            grad_ptr=written,
            kd_ptr=kd,
            ce_ptr=ce,
            stride_student_row=student_logits.stride(0),
            stride_teacher_row=teacher_logits.stride(0),
            stride_grad_row=written.stride(0),
            V=vocabulary,
            inverse_temperature=1.0 / terms.temperature,
            kd_scale=float(terms.kd_scale),
            ce_weight=float(terms.ce_weight),
            beta=float(divergence.beta) if isinstance(divergence, JSD) else 0.5,
            DIVERGENCE=KERNEL_NAMES[type(divergence)],
            HAS_LABELS=with_ce,
            CE_AT_ONE=with_ce and terms.temperature != 1.0,
            HAS_STUDENT_BIAS=student_bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            HAS_ROW_WEIGHT=row_weight is not None,
            WRITE_GRAD=grad is not None,
            ALIASED=aliased,
            BLOCK=config.block,
            WIDTH=config.width,
            **launch_options(
                config, vocabulary, student_logits.stride(0), teacher_logits.stride(0), written.stride(0)
            ),
        )
    return kd, ce
