"""The loss of a case: its divergence and its teacher as our functions take them, and as people write them by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import IGNORE_INDEX, KEPT, Case, Inputs

if TYPE_CHECKING:
    from kdkernels import Divergence, TeacherCrossTerm, TeacherHead, TeacherLogits, TeacherTopK

    AnyTeacher = TeacherHead | TeacherLogits | TeacherTopK | TeacherCrossTerm


def divergence_of(case: Case) -> str | Divergence:
    """By its name, or the object that a name stands for here."""
    # Imported where it is used, as the processes that measure put the checkout on their path first.
    from kdkernels import AlphaBeta, Decoupled

    objects: dict[str, Divergence] = {"alpha_beta": AlphaBeta(0.2, 0.7), "decoupled": Decoupled(1.0, 4.0)}
    return objects.get(case.divergence, case.divergence)


def teacher_of(case: Case, inputs: Inputs, dtype: torch.dtype | None = None) -> AnyTeacher:
    """The teacher in the form of the case; what it was made from is not needed in a step."""
    from kdkernels import TeacherHead, TeacherLogits, TeacherTopK, teacher_cross_term

    hidden, weight = inputs.teacher_hidden, inputs.teacher_weight
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if case.teacher == "head":
        return TeacherHead(hidden, weight)
    if case.teacher == "cross_term":
        head = inputs.student_weight.detach().to(weight.dtype)
        return teacher_cross_term(TeacherHead(hidden, weight), head)
    logits = torch.cat([part @ weight.T for part in hidden.split(256)])
    if case.teacher == "logits":
        return TeacherLogits(logits)
    best = [part.log_softmax(-1).topk(KEPT) for part in logits.split(256)]
    logprobs, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    return TeacherTopK(logprobs, indices, "bucket" if case.teacher == "top_k_bucket" else "renormalize")


def rows_of(teacher: AnyTeacher, rows: slice) -> AnyTeacher:
    """Some rows of a teacher: all of its tensors but a head's have them as their first axis."""
    names = {"hidden", "logits", "logprobs", "indices", "cross", "bias", "entropy"} & vars(teacher).keys()
    parts = {name: getattr(teacher, name)[rows] for name in names if getattr(teacher, name) is not None}
    return replace(teacher, **parts)


def eager_loss(
    divergence: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
) -> Tensor:
    """What people write: both logit tensors whole, `log_softmax` of each, `F.kl_div`."""
    student = F.log_softmax(F.linear(student_hidden, student_weight), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight), dim=-1)
    counted = labels != IGNORE_INDEX
    if divergence == "decoupled":
        rows = _decoupled(student, teacher, labels.clamp_min(0))
    else:
        rows = _terms(divergence, student, teacher).sum(-1)
    return (rows * counted).sum() / counted.sum()


def _terms(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """(N, V) terms of two log-distributions."""
    if divergence == "forward_kl":
        return F.kl_div(student, teacher, reduction="none", log_target=True)
    if divergence == "reverse_kl":
        return F.kl_div(teacher, student, reduction="none", log_target=True)
    if divergence == "jsd":
        middle = _mixture(student, teacher, 0.5)
        from_teacher = F.kl_div(middle, teacher, reduction="none", log_target=True)
        from_student = F.kl_div(middle, student, reduction="none", log_target=True)
        return (from_teacher + from_student) / 2
    if divergence == "skew_kl":
        return F.kl_div(_mixture(student, teacher, 0.1), teacher, reduction="none", log_target=True)
    if divergence == "skew_reverse_kl":
        return F.kl_div(_mixture(student, teacher, 0.9), student, reduction="none", log_target=True)
    if divergence == "tvd":
        return (student.exp() - teacher.exp()).abs() / 2
    if divergence == "alpha_beta":
        a, b = 0.2, 0.7
        both = (a / (a + b)) * ((a + b) * teacher).exp() + (b / (a + b)) * ((a + b) * student).exp()
        return (both - (a * teacher + b * student).exp()) / (a * b)
    raise ValueError(f"no eager lines for {divergence}")


def _mixture(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """log(share p_t + (1 - share) p_s)."""
    weights = torch.tensor([1.0 - share, share], device=student.device).log()
    return torch.logsumexp(torch.stack([student + weights[0], teacher + weights[1]]), dim=0)


def _decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """(N,) DKD as its authors write it: the label masked out by a large negative number."""
    own = F.one_hot(labels, student.shape[1]).bool()
    p_s, p_t = student.exp(), teacher.exp()
    two_s, two_t = (
        torch.stack([(p * own).sum(-1), (p * ~own).sum(-1)], -1).clamp_min(1e-12) for p in (p_s, p_t)
    )
    target = (two_t * (two_t.log() - two_s.log())).sum(-1)
    others_s, others_t = (F.log_softmax(log_p - 1000.0 * own, -1) for log_p in (student, teacher))
    return target + 4.0 * F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(-1)


def eager_stored_loss(
    divergence: str, student_hidden: Tensor, student_weight: Tensor, teacher: Any, labels: Tensor
) -> Tensor:
    """The same with stored teacher logits."""
    student = F.log_softmax(F.linear(student_hidden, student_weight), dim=-1)
    counted = labels != IGNORE_INDEX
    rows = _terms(divergence, student, F.log_softmax(teacher.logits, dim=-1)).sum(-1)
    return (rows * counted).sum() / counted.sum()


def eager_top_k_loss(
    divergence: str, student_hidden: Tensor, student_weight: Tensor, teacher: Any, labels: Tensor
) -> Tensor:
    """Forward KL over the kept entries, as people write it; with "bucket" one category for the rest."""
    assert divergence == "forward_kl"
    student = F.log_softmax(F.linear(student_hidden, student_weight), dim=-1)
    mine, its = student.gather(1, teacher.indices), teacher.logprobs
    if teacher.tail == "bucket":
        rest_s, rest_t = (1.0 - log_p.exp().sum(-1, keepdim=True) for log_p in (mine, its))
        mine, its = (
            torch.cat([log_p, rest.clamp_min(1e-9).log()], -1)
            for log_p, rest in ((mine, rest_s), (its, rest_t))
        )
    else:
        its = F.log_softmax(its, -1)
    counted = labels != IGNORE_INDEX
    rows = F.kl_div(mine, its, reduction="none", log_target=True).sum(-1)
    return (rows * counted).sum() / counted.sum()
