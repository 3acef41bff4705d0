"""The arguments that the kernel on whole rows and the kernel on tiles of the vocabulary have in common."""

from typing import Any

from torch import Tensor

from ...options import RowTerms
from ..launch import RowConfig, architecture_of, launch_options, refuse_float64, row_config
from .divergence import kernel_divergence
from .flags import RowFlags, transform_numbers


def pointer(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """A pointer that its flag leaves unread is given the logits, so that one signature serves all."""
    return unread if tensor is None else tensor.contiguous()


def row_arguments(
    flags: RowFlags,
    terms: RowTerms,
    student: Tensor,  # (R, V) or a tile of it
    teacher: Tensor,
    labels: Tensor | None,  # (R,)
    *,
    biases: tuple[Tensor | None, Tensor | None],
    row_weight: Tensor | None,  # (R,)
    decoupled: tuple[Tensor, Tensor] | None,  # (R,) each
    grad: Tensor | None,  # (R, V) or a tile of it
    fits_default_registers: bool,
    config: RowConfig | None,
) -> dict[str, Any]:
    """Pointers, strides and numbers of both rows, flags, and the options of the launch; keys are the kernels' names."""
    refuse_float64(student_logits=student, teacher_logits=teacher)
    if config is None:
        config = row_config(architecture_of(student.device))
    written = student if grad is None else grad
    divergence = kernel_divergence(terms.divergence)
    student_slope, student_softcap = transform_numbers(terms.student_transform)
    teacher_slope, teacher_softcap = transform_numbers(terms.teacher_transform)
    target, non_target = (None, None) if decoupled is None else decoupled
    return {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "labels_ptr": pointer(labels, student),
        "student_bias_ptr": pointer(biases[0], student),
        "teacher_bias_ptr": pointer(biases[1], student),
        "target_ptr": pointer(target, student),
        "non_target_ptr": pointer(non_target, student),
        "row_weight_ptr": pointer(row_weight, student),
        "grad_ptr": written,
        "stride_student_row": student.stride(0),
        "stride_teacher_row": teacher.stride(0),
        "stride_grad_row": written.stride(0),
        "inverse_temperature": 1.0 / terms.temperature,
        "first": float(divergence.first),
        "second": float(divergence.second),
        "kd_scale": float(terms.kd_scale),
        "ce_weight": float(terms.ce_weight),
        "label_smoothing": float(terms.label_smoothing),
        "student_slope": float(student_slope),
        "student_softcap": float(student_softcap),
        "teacher_slope": float(teacher_slope),
        "teacher_softcap": float(teacher_softcap),
        "FLAGS": flags,
        "BLOCK": config.block,
        "WIDTH": config.width,
        **launch_options(
            config,
            student.shape[1],
            student.stride(0),
            teacher.stride(0),
            written.stride(0),
            fits_default_registers=fits_default_registers,
        ),
    }
