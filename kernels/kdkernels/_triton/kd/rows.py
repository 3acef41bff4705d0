"""Row kernel of the divergences: values of a row of student and teacher logits, and the gradient written in place.

Passes over a row of V logits on both sides: statistics (`online.py`); for the mixtures their value and mean slope,
which need both normalisers; last the gradient together with the value of the others (`passes.py`).
`kd_gradient` writes the gradient from what an earlier launch for the values kept of a row: one pass.
Bytes moved per logit: 2 x (student + teacher) reads + 1 gradient write, 3 x for mixtures: 18 and 26 with fp32 logits and
a half gradient, 10 and 14 with half logits. Cross entropy and label smoothing add none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...options import RowTerms
from ..aliasing import aliases_input
from ..launch import RowConfig, device_guard
from ..numeric import LN_2, LOG2_E, finite_or_zero, join_lanes, write_zeros
from .arguments import pointer, row_arguments
from .flags import row_flags
from .labels import cross_entropy, decoupled_parts, student_label, teacher_label
from .online import first_pass, join_statistics, load_totals, save_totals, with_mean
from .passes import GradientFactors, RowScalars, last_pass, sums_pass
from .row import LogitRow, Row

# Pointers to one number a row: slices of them start anywhere.
_SCALARS = ["labels_ptr", "target_ptr", "non_target_ptr", "row_weight_ptr", "kd_ptr", "ce_ptr", "state_ptr"]


# Neither a chunk of another number of rows nor one that starts elsewhere recompiles.
@triton.jit(do_not_specialize=["stride_state_row"], do_not_specialize_on_alignment=_SCALARS)
def _kd_rows_kernel(
    student_ptr,  # (R, V)
    teacher_ptr,  # (R, V_teacher)
    labels_ptr,  # (R,) int64, read when has_labels and the row's weight is not 0
    student_bias_ptr,  # (V,)
    teacher_bias_ptr,  # (V_teacher,)
    map_ptr,  # (V,) int32
    target_ptr,  # (R,) fp32, weights of the decoupled divergence
    non_target_ptr,  # (R,) fp32
    row_weight_ptr,  # (R,) fp32
    grad_ptr,  # (R, V), may share memory with student_ptr
    kd_ptr,  # (R,) fp32, written
    ce_ptr,  # (R,) fp32, written
    state_ptr,  # (ROW_STATE, R) fp32, written or read as FLAGS.state says; read, no values are written
    stride_student_row,
    stride_teacher_row,
    stride_grad_row,
    stride_state_row,
    V,
    V_teacher,
    shared,  # columns that both sides have: V without a map or with an index map
    inverse_temperature,
    first,
    second,
    kd_scale,
    ce_weight,
    label_smoothing,
    student_slope,
    student_softcap,
    teacher_slope,
    teacher_softcap,
    FLAGS: tl.constexpr,  # RowFlags
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row_index = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    grad_row = grad_ptr + row_index * stride_grad_row
    state_ptr += row_index

    weight = 1.0
    if FLAGS.has_row_weight:
        weight = tl.load(row_weight_ptr + row_index)
        if weight == 0.0:  # nothing of the row is read: neither its logits nor its label need be valid
            if FLAGS.state != "load":
                tl.store(kd_ptr + row_index, 0.0)
                tl.store(ce_ptr + row_index, 0.0)
            if FLAGS.write_grad:
                write_zeros(grad_row, V, tile, BLOCK)
            return

    label = tl.full((), -1, tl.int64)
    valid = label >= 0
    if FLAGS.has_labels:
        label = tl.load(labels_ptr + row_index)
        valid = (label >= 0) & (label < V)
    student = LogitRow(
        student_ptr + row_index * stride_student_row, student_bias_ptr, student_slope, student_softcap
    )
    teacher = LogitRow(
        teacher_ptr + row_index * stride_teacher_row, teacher_bias_ptr, teacher_slope, teacher_softcap
    )
    row = Row(student, teacher, map_ptr, V, V_teacher, shared, label.to(tl.int32))
    label_logit = 0.0
    teacher_logit = 0.0
    label_shared = valid
    if FLAGS.has_labels:
        label_logit = student_label(row, label, valid, FLAGS)
        ce_weight = tl.where(valid, ce_weight, float("nan"))
    if FLAGS.divergence == "decoupled":
        teacher_logit, label_shared = teacher_label(row, label, valid, FLAGS)

    numbers = RowScalars(inverse_temperature * LOG2_E, inverse_temperature, first, second)
    ce = 0.0
    uniform = label_smoothing / V
    if FLAGS.state == "load":
        totals, ce_reference, ce_inverse = load_totals(
            state_ptr, stride_state_row, tl.constexpr(FLAGS.divergence)
        )
    else:
        pivot = finite_or_zero(label_logit)
        state = first_pass(row, numbers, pivot, tile, FLAGS, BLOCK, LANES)
        totals = join_statistics(state, numbers, FLAGS)
        ce_reference = totals.student_reference
        ce_inverse = totals.student_inverse
        if FLAGS.has_ce:
            if FLAGS.ce_sum == "shared":
                log_total = totals.student_log * LN_2
            else:
                if FLAGS.ce_sum == "own":
                    ce_reference, total = join_lanes(state.full_max, state.full_total, LOG2_E)
                else:
                    _, total = join_lanes(state.student_max, state.total_at_one, LOG2_E)
                log_total = tl.log2(total) * LN_2
                ce_inverse = 1.0 / total
            logit_sum = tl.sum(state.logit_sum, axis=0)
            ce = cross_entropy(label_logit, ce_reference, log_total, logit_sum, uniform, FLAGS.has_smoothing)

    target_kd = 0.0
    label_difference = 0.0
    rest = 1.0
    if FLAGS.divergence == "decoupled":
        shared_logit = tl.where(label_shared | (label_logit != label_logit), label_logit, float("-inf"))
        target_kd, label_difference, rest = decoupled_parts(
            shared_logit,
            teacher_logit,
            totals,
            tl.load(target_ptr + row_index),
            tl.load(non_target_ptr + row_index),
            numbers.scale,
        )

    if FLAGS.needs_mean_pass and FLAGS.state != "load":
        value, mean, uncentred_mean = sums_pass(row, numbers, totals, tile, FLAGS, BLOCK, LANES)
        tl.store(kd_ptr + row_index, value)
        totals = with_mean(totals, mean, uncentred_mean, first, tl.constexpr(FLAGS.divergence))
    if FLAGS.state == "save":
        save_totals(
            state_ptr, stride_state_row, totals, ce_reference, ce_inverse, tl.constexpr(FLAGS.divergence)
        )
    if FLAGS.write_grad or not FLAGS.needs_mean_pass:
        slopes = GradientFactors(
            weight * kd_scale * inverse_temperature,
            weight * ce_weight,
            label_smoothing,
            uniform,
            ce_reference,
            ce_inverse,
            label_difference,
            rest,
        )
        value = last_pass(row, grad_row, numbers, totals, slopes, tile, FLAGS, BLOCK, LANES)
        if FLAGS.divergence == "decoupled":
            value = target_kd + rest * value
        if not FLAGS.needs_mean_pass and FLAGS.state != "load":
            tl.store(kd_ptr + row_index, value)
    if FLAGS.state != "load":
        tl.store(ce_ptr + row_index, ce)


def kd_rows(
    student_logits: Tensor,  # (R, V)
    teacher_logits: Tensor,  # (R, V_t)
    labels: Tensor | None,  # (R,) int64
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    row_weight: Tensor | None = None,  # (R,)
    grad: Tensor | None = None,  # (R, V)
    vocab_map: int | Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
    state: Tensor | None = None,  # (ROW_STATE, R) fp32, written for `kd_gradient`
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:  # (R,) fp32, (R,) fp32
    """Divergence and cross entropy of every row, and row_weight * d(row loss)/d(student_logits) written into `grad`.

    The contract is `core.backend.Backend.kd_rows`. Logits are fp16, bf16 or fp32 on either side, the last axis
    contiguous; everything is computed in fp32 and rounded once to the dtype of `grad`. `grad` may be `student_logits`
    itself or a narrower view of the same rows, such as the (R, 2V) half view of an fp32 buffer cut to V columns: the row
    is overwritten only where it has been read. Rows of weight 0 are not read; their values are 0 and their gradient is
    exactly 0. `config` replaces the table's configuration.
    """
    kd = torch.empty(len(student_logits), dtype=torch.float32, device=student_logits.device)
    ce = torch.empty_like(kd)
    _launch(
        student_logits,
        teacher_logits,
        labels,
        terms,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        row_weight=row_weight,
        grad=grad,
        vocab_map=vocab_map,
        decoupled=decoupled,
        values=(kd, ce),
        state=state,
        config=config,
    )
    return kd, ce


def kd_gradient(
    student_logits: Tensor,  # (R, V)
    teacher_logits: Tensor,  # (R, V_t)
    labels: Tensor | None,  # (R,) int64
    terms: RowTerms,
    *,
    state: Tensor,  # (ROW_STATE, R) fp32
    grad: Tensor,  # (R, V)
    row_weight: Tensor | None = None,  # (R,)
    vocab_map: int | Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
    config: RowConfig | None = None,
) -> None:
    """The gradient that `kd_rows` writes, in one pass over both rows, from the state that a call for the values kept.

    The contract is `core.backend.Backend.kd_gradient`.
    """
    _launch(
        student_logits,
        teacher_logits,
        labels,
        terms,
        row_weight=row_weight,
        grad=grad,
        vocab_map=vocab_map,
        decoupled=decoupled,
        values=None,
        state=state,
        config=config,
    )


def _launch(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None,
    grad: Tensor | None,
    vocab_map: int | Tensor | None,
    decoupled: tuple[Tensor, Tensor] | None,
    values: tuple[Tensor, Tensor] | None,
    state: Tensor | None,
    config: RowConfig | None,
) -> None:
    """Launch the kernel for values and gradient, or, without `values`, for the gradient from a state."""
    rows, vocabulary = student_logits.shape
    if rows == 0:
        return
    flags = row_flags(
        terms,
        labels=labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        row_weight=row_weight,
        vocab_map=vocab_map,
        write_grad=grad is not None,
        aliased=grad is not None and aliases_input(grad, student_logits),
        state="none" if state is None else "load" if values is None else "save",
    )
    index_map = vocab_map.to(torch.int32) if isinstance(vocab_map, Tensor) else None
    arguments = row_arguments(
        flags, terms, student_logits, teacher_logits, labels, biases=(student_bias, teacher_bias),
        row_weight=row_weight, decoupled=decoupled, grad=grad, fits_default_registers=flags.fits_default_registers, config=config,
    )  # fmt: skip
    kd, ce = (None, None) if values is None else values
    with device_guard(student_logits.device):
        _kd_rows_kernel[(rows,)](
            map_ptr=pointer(index_map, student_logits),
            kd_ptr=pointer(kd, student_logits),
            ce_ptr=pointer(ce, student_logits),
            state_ptr=student_logits if state is None else state,
            stride_state_row=0 if state is None else state.stride(0),
            V=vocabulary,
            V_teacher=teacher_logits.shape[1],
            shared=vocab_map if isinstance(vocab_map, int) else vocabulary,
            **arguments,
        )
