"""Launchers of the work on tiles of the vocabulary."""

from typing import Any, Literal

from torch import Tensor

from ...divergences import Decoupled
from ...options import RowTerms
from ..aliasing import lies_over
from ..launch import RowConfig, architecture_of, device_guard, launch_options, row_config
from .divergence import kernel_divergence
from .flags import RowFlags, row_flags, transform_numbers
from .tiles import _tile_kernel


def tile_statistics(
    student_logits: Tensor,  # (R, C)
    teacher_logits: Tensor | None,  # (R, C)
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    state: Tensor,  # (SLOTS, R) fp32
    *,
    offset: int,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    config: RowConfig | None = None,
) -> None:
    """Merge columns [offset, offset + C) into the statistics of every row.

    The contract is `kdkernels.backends.Backend.tile_statistics`.
    """
    flags = _flags(terms, labels, student_bias, teacher_bias, row_weight, None, aliased=False)
    if flags.divergence != "decoupled":  # all others have the same statistics
        flags = flags._replace(divergence="forward_kl", mixture=False)
    _launch(
        "statistics", flags, student_logits, teacher_logits, labels, terms, state, offset, student_bias, teacher_bias,
        row_weight, config,
    )  # fmt: skip


def tile_sums(
    student_logits: Tensor,  # (R, C)
    teacher_logits: Tensor,  # (R, C)
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    state: Tensor,  # (SLOTS, R) fp32
    *,
    offset: int,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    config: RowConfig | None = None,
) -> None:
    """Add a tile to the value and the mean slope of every row whose statistics are complete.

    The contract is `kdkernels.backends.Backend.tile_sums`.
    """
    flags = _flags(terms, labels, student_bias, teacher_bias, row_weight, None, aliased=False)
    flags = flags._replace(has_labels=flags.divergence == "decoupled", has_ce=False, ce_sum="shared")
    flags = flags._replace(has_smoothing=False)
    _launch(
        "sums", flags, student_logits, teacher_logits, labels, terms, state, offset, student_bias, teacher_bias,
        row_weight, config,
    )  # fmt: skip


def tile_gradient(
    student_logits: Tensor,  # (R, C)
    teacher_logits: Tensor | None,  # (R, C)
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    state: Tensor,  # (SLOTS, R) fp32
    *,
    offset: int,
    vocabulary: int,
    grad: Tensor,  # (R, C)
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
    add_value: bool = False,
    config: RowConfig | None = None,
) -> None:
    """row_weight * d(row loss)/d(student) of a tile into `grad`, which may lie over the logits as in `kd_rows`.

    The contract is `kdkernels.backends.Backend.tile_gradient`.
    """
    flags = _flags(
        terms, labels, student_bias, teacher_bias, row_weight, grad, aliased=lies_over(grad, student_logits)
    )
    if teacher_logits is None and not flags.has_ce:
        grad.zero_()
        return
    _launch(
        "gradient", flags, student_logits, teacher_logits, labels, terms, state, offset, student_bias, teacher_bias,
        row_weight, config, grad=grad, decoupled=decoupled, uniform=terms.label_smoothing / vocabulary,
        add_value=add_value and teacher_logits is not None,
    )  # fmt: skip


def _flags(
    terms: RowTerms,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    grad: Tensor | None,
    aliased: bool,
) -> RowFlags:
    flags = row_flags(
        terms,
        labels=labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        row_weight=row_weight,
        vocab_map=None,
        stats=None,
        write_grad=grad is not None,
        aliased=aliased,
    )
    # The cross entropy is over all columns, the divergence perhaps not: its sum is always one of its own.
    return flags._replace(ce_sum="own" if flags.has_ce else "shared")


def _launch(
    work: Literal["statistics", "sums", "gradient"],
    flags: RowFlags,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    terms: RowTerms,
    state: Tensor,
    offset: int,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    config: RowConfig | None,
    *,
    grad: Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
    uniform: float = 0.0,
    add_value: bool = False,
) -> None:
    """Launch one pass over one tile."""
    rows, columns = student.shape
    if rows == 0 or columns == 0:
        return
    if isinstance(terms.divergence, Decoupled) and labels is None:
        raise ValueError("the decoupled divergence needs labels, got None")
    if config is None:
        config = row_config(architecture_of(student.device))
    other = student if teacher is None else teacher
    written = student if grad is None else grad
    divergence = kernel_divergence(terms.divergence)
    student_slope, student_softcap = transform_numbers(terms.student_transform)
    teacher_slope, teacher_softcap = transform_numbers(terms.teacher_transform)
    target, non_target = (None, None) if decoupled is None else decoupled

    def pointer(tensor: Tensor | None) -> Tensor:
        """A pointer that its flag leaves unread is given the logits, so that one signature serves all."""
        return student if tensor is None else tensor.contiguous()

    options: dict[str, Any] = launch_options(
        config, columns, student.stride(0), other.stride(0), written.stride(0), lean=False
    )
    with device_guard(student.device):
        _tile_kernel[(rows,)](
            student_ptr=student,
            teacher_ptr=other,
            labels_ptr=pointer(labels),
            student_bias_ptr=pointer(student_bias),
            teacher_bias_ptr=pointer(teacher_bias),
            target_ptr=pointer(target),
            non_target_ptr=pointer(non_target),
            row_weight_ptr=pointer(row_weight),
            grad_ptr=written,
            state_ptr=state,
            stride_student_row=student.stride(0),
            stride_teacher_row=other.stride(0),
            stride_grad_row=written.stride(0),
            stride_state_row=state.stride(0),
            C=columns,
            offset=offset,
            inverse_temperature=1.0 / terms.temperature,
            first=float(divergence.first),
            second=float(divergence.second),
            kd_scale=float(terms.kd_scale),
            ce_weight=float(terms.ce_weight),
            label_smoothing=float(terms.label_smoothing),
            uniform=float(uniform),
            student_slope=float(student_slope),
            student_softcap=float(student_softcap),
            teacher_slope=float(teacher_slope),
            teacher_softcap=float(teacher_softcap),
            PASS=work,
            HAS_TEACHER=teacher is not None,
            ADD_VALUE=add_value,
            FLAGS=flags,
            BLOCK=config.block,
            WIDTH=config.width,
            **options,
        )
