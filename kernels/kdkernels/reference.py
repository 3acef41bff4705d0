"""The specification: every loss as plain eager PyTorch in float32 (float64 for float64 inputs).

Autograd supplies the gradients. Nothing here is chunked or in place; a fast back end is right when
it agrees with this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import JSD, BuiltDivergence, ForwardKL
from .matmul import wide_dtype
from .options import Project, RowTerms
from .teachers import TeacherHead, TeacherLogits


def wide(tensor: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor.to(wide_dtype(tensor.dtype))


def linear(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """hidden (..., D) @ weight (V, D).T + bias (V,) in float32 or float64."""
    out = wide(hidden) if weight is None else wide(hidden) @ wide(weight).transpose(0, 1)
    return out if bias is None else out + wide(bias)


def teacher_logits(teacher: TeacherLogits | TeacherHead) -> Tensor:
    """(..., V) in float32 or float64."""
    if isinstance(teacher, TeacherLogits):
        return wide(teacher.logits)
    return linear(teacher.hidden, teacher.weight, teacher.bias)


def _expectation(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """sum p * log_ratio over the last axis; entries of probability 0 count as 0, whatever the ratio."""
    p = log_p.exp()
    return (p * log_ratio.masked_fill(p == 0, 0.0)).sum(-1)


def divergence(log_p_s: Tensor, log_p_t: Tensor, kind: BuiltDivergence) -> Tensor:
    """D of two log-distributions (..., V), summed over the last axis."""
    if isinstance(kind, ForwardKL):
        return _expectation(log_p_t, log_p_t - log_p_s)
    if isinstance(kind, JSD):
        beta = kind.beta
        mixture = beta * log_p_t.exp() + (1.0 - beta) * log_p_s.exp()
        # Clamped for entries in which both probabilities are 0: their ratios are not counted, but log(0) has no slope.
        log_m = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
        teacher, student = _expectation(log_p_t, log_p_t - log_m), _expectation(log_p_s, log_p_s - log_m)
        return beta * teacher + (1.0 - beta) * student
    return _expectation(log_p_s, log_p_s - log_p_t)


def kd_row_losses(
    student_logits: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V) logits
    labels: Tensor | None,  # (N,)
    weight: Tensor | None,  # (N,)
    terms: RowTerms,
) -> Tensor:
    """(N,) kd_scale * D(p_t, p_s) + ce_weight * CE; 0 in rows of weight 0."""
    dead = None
    if weight is not None:
        # Rows that do not count may hold anything; replacing them first keeps NaN out of the gradient too.
        dead = weight == 0
        student_logits = student_logits.masked_fill(dead.unsqueeze(1), 0.0)
        teacher = teacher.masked_fill(dead.unsqueeze(1), 0.0)
    log_p_s = F.log_softmax(student_logits / terms.temperature, -1)
    log_p_t = F.log_softmax(teacher / terms.temperature, -1)
    loss = terms.kd_scale * divergence(log_p_s, log_p_t, terms.divergence)
    if labels is not None and terms.ce_weight != 0.0:
        target = labels if dead is None else labels.masked_fill(dead, 0)
        loss = loss + terms.ce_weight * F.cross_entropy(student_logits, target, reduction="none")
    return loss if dead is None else loss.masked_fill(dead, 0.0)


def projection_row_losses(
    student: Tensor,  # (N, D_s)
    teacher: Tensor,  # (N, D_t)
    head: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,  # (N,)
    project: Project,
    cast: torch.dtype | None,  # what autocast makes of the projected side and of head
) -> Tensor:
    """(N,) sums of squared differences; 0 in rows of weight 0."""
    if weight is not None:
        dead = (weight == 0).unsqueeze(1)
        student, teacher = student.masked_fill(dead, 0.0), teacher.masked_fill(dead, 0.0)
    source, target = (student, teacher) if project == "student" else (teacher, student)
    if cast is not None and head is not None:
        source, head = source.to(cast), head.to(cast)
    loss = (linear(source, head, bias) - wide(target)).square().sum(-1)
    return loss if weight is None else loss.masked_fill(weight == 0, 0.0)
