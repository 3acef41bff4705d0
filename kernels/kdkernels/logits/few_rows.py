"""`kd_loss` of few logits on a CPU, such as a classifier's: checks, counting and chunks cost more there than the loss.

This is a short way for the plainest calls. Whatever is not one of them, or is wrong with one, goes the general way, which
has the sentences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..core.autograd import without_second_derivative
from ..core.backend import load_backend
from ..core.compiling import is_tracing, recorded, transformed
from ..core.rows import flat
from ..options import Reduction, RowTerms
from ..teachers import TeacherLogits

# Up to this many elements (256 KiB in float32) the gradient is always made with the value, and on a CPU by this short way.
SMALL_LOGITS = 1 << 16


class GradientKept(Function):
    """A loss that brings its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
        loss, ctx.gradient = found
        ctx.save_for_backward(logits)  # read by a second derivative only
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if not torch.is_grad_enabled():
            return ctx.gradient * upstream[0], None
        gradient = ctx.gradient * upstream[0].detach()
        return *without_second_derivative((gradient,), upstream[0], ctx.saved_tensors), None


def _fits(tensor: Tensor, device: torch.device, shape: torch.Size) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    return plain and tensor.device == device and tensor.shape == shape


def _is_plain(student: Tensor, teacher: object, terms: RowTerms) -> bool:
    return (
        student.device.type == "cpu"
        and 0 < student.numel() <= SMALL_LOGITS
        and student.dtype in (torch.float32, torch.float64)
        and isinstance(teacher, Tensor)
        and teacher.dtype == student.dtype
        and _fits(teacher, student.device, student.shape)
        and not teacher.requires_grad
        and terms.kd_scale != 0.0
        and terms.label_smoothing == 0.0
        and terms.student_transform.is_identity
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
        and not recorded()
        and not is_tracing()
    )


def _every_row_counts(student: Tensor, labels: Tensor, ignore_index: int) -> bool:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        return False
    if not _fits(labels, student.device, student.shape[:-1]):
        return False
    least, most = labels.aminmax()
    first, last = int(least), int(most)
    return first >= 0 and last < student.shape[-1] and not first <= ignore_index <= last


def few_rows_loss(
    student: Tensor,  # (..., V), checked
    teacher: object,
    labels: Tensor | None,
    terms: RowTerms,
    ignore_index: int,
    reduction: Reduction,
    num_items: int | Tensor | None,
) -> Tensor | None:
    """The loss, or None for the general way."""
    logits = teacher.logits if isinstance(teacher, TeacherLogits) else teacher
    if reduction == "none" or not _is_plain(student, logits, terms):
        return None
    if labels is None:
        if terms.ce_weight != 0.0:
            return None
    elif not _every_row_counts(student, labels, ignore_index):
        return None
    assert isinstance(logits, Tensor)
    few_rows = load_backend("torch").few_rows
    assert few_rows is not None
    count = student.numel() // student.shape[-1]
    divisor = 1.0
    if reduction == "mean":
        divisor = float(count if num_items is None else num_items)
        if divisor == 0.0:
            return None
    if labels is not None and terms.ce_weight == 0.0:
        labels = None
    if student.dim() > 2:
        student, logits = flat(student), flat(logits)
        labels = None if labels is None else labels.reshape(-1)
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    found = few_rows(student.detach(), logits, labels, terms, 1.0 / divisor, with_gradient)
    if found is None:
        return None
    loss, gradient = found
    return loss if gradient is None else GradientKept.apply(student, found)
