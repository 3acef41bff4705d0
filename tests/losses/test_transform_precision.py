"""Scale and softcap are computed in float32 (float64 for float64), whatever the dtype of the logits and the form of the teacher."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdkernels import (
    ForwardKL,
    SkewKL,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from kdkernels.options import Impl
from kdkernels.teachers import Teacher
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS

ROWS, VOCABULARY, WIDTH, KEPT = 10, 61, 16, 7
TRANSFORMS = [(1.0, None), (-1.3, None), (1.0, 9.0), (0.8, 30.0)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TEMPERATURE, CE_WEIGHT = 2.0, 0.5


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return logits * scale if softcap is None else torch.tanh(logits * scale / softcap) * softcap


def by_hand(logits: Tensor, log_p_t: Tensor | None, teacher: Teacher, labels: Tensor, divergence) -> Tensor:
    """Row losses in float64 from transformed student logits; `log_p_t` (N, V) at T, or the entries of a top k."""
    rows = CE_WEIGHT * torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    if isinstance(teacher, TeacherTopK) and teacher.tail == "bucket":
        kept = logits.log_softmax(-1).gather(1, teacher.indices)
        others = logits.scatter(1, teacher.indices, -math.inf).logsumexp(1, True) - logits.logsumexp(1, True)
        log_t = teacher.logprobs.double()
        log_t = torch.cat((log_t, (1.0 - log_t.exp().sum(1, True)).log()), 1)
        log_p_t = (log_t / TEMPERATURE).log_softmax(1)
        log_p_s = (torch.cat((kept, others), 1) / TEMPERATURE).log_softmax(1)
    else:
        log_p_s = (logits / TEMPERATURE).log_softmax(-1)
    if log_p_t is None:
        return rows
    p_t = log_p_t.exp()
    alpha = divergence.alpha if isinstance(divergence, SkewKL) else 0.0
    mixture = torch.logaddexp(
        log_p_t + (math.log(alpha) if alpha else -math.inf), log_p_s + math.log1p(-alpha)
    )
    return rows + TEMPERATURE**2 * (torch.xlogy(p_t, p_t) - p_t * mixture).sum(-1)


def step_of(dtype: torch.dtype) -> float:
    """Half a unit in the last place: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_rounded_once(
    rows: Tensor,
    gradient: Tensor,
    exact_rows: Tensor,
    exact_gradient: Tensor,
    size: float,
    scale: float,
    truncates: bool,
) -> None:
    """Errors that float32 arithmetic and one rounding of the gradient explain.

    A transformed logit is off by `size` roundings of 1 (a sum of products, two factors and a tanh: at most 8 of them),
    so a log-probability at T by twice that and the rounding of its log-sum-exp; a probability by as many of its
    relative roundings; a row's value is an average of log-probabilities, its gradient of probabilities. Triton's
    interpreter truncates to bfloat16, which is twice the error of rounding.
    """
    unit = step_of(computed_in(rows.dtype))
    log_error = (2 * 8 * size + 8) * unit
    bound = (TEMPERATURE**2 + CE_WEIGHT) * 2 * log_error
    assert (rows.double() - exact_rows).abs().max().item() <= bound
    # Two probabilities, each at most 1, times T^2 / T and the label's weight, times the slope of the transform.
    arithmetic = (TEMPERATURE + CE_WEIGHT) * 2 * log_error * scale
    least = torch.finfo(gradient.dtype).smallest_normal * step_of(gradient.dtype)
    allowed = (
        (2.02 if truncates else 1.01) * step_of(gradient.dtype) * exact_gradient.abs() + arithmetic + least
    )
    excess = (gradient.double() - exact_gradient).abs() / allowed
    assert excess.max().item() <= 1.0


def teacher_of(form: str, dtype: torch.dtype, student_weight: Tensor) -> tuple[Teacher, Tensor | None]:
    """A teacher in that form, and its log-probabilities at T in float64 (None where the loss does not use them so)."""
    hidden = torch.randn(ROWS, WIDTH, device=DEVICE).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, device=DEVICE) * 0.7).to(dtype)
    logits = hidden.double() @ weight.double().T
    if form == "head":
        return TeacherHead(hidden, weight), (logits / TEMPERATURE).log_softmax(-1)
    if form == "logits":
        given = logits.to(dtype)
        return TeacherLogits(given), (given.double() / TEMPERATURE).log_softmax(-1)
    if form == "labels":
        return TeacherLogits(logits.to(dtype)), None
    log_p_t = (logits / TEMPERATURE).log_softmax(-1)
    if form == "cross_term":
        p_t = log_p_t.exp()
        wide = computed_in(dtype)
        cross = (p_t @ student_weight.double()).to(wide)
        entropy = -(p_t * log_p_t).sum(-1)
        zero = torch.zeros(ROWS, dtype=wide, device=DEVICE)
        return TeacherCrossTerm(cross, zero, entropy.to(wide), TEMPERATURE), log_p_t
    logprobs, indices = logits.log_softmax(-1).topk(KEPT)
    teacher = TeacherTopK(logprobs.to(computed_in(dtype)), indices, form)  # pyright: ignore[reportArgumentType]
    kept = torch.full_like(logits, -math.inf)
    kept.scatter_(1, indices, (teacher.logprobs.double() / TEMPERATURE).log_softmax(-1))
    return teacher, kept.clamp_min(-1e4)


FORMS = ["logits", "head", "renormalize", "bucket", "labels"]
CASES = list(itertools.product(FORMS, TRANSFORMS))
# A cross-term stands for logits without a softcap.
ROUNDED = [case for case in CASES if case[0] not in ("logits", "head")]
ROUNDED += [("cross_term", transform) for transform in TRANSFORMS if transform[1] is None]
# The triton back end computes in float32.
RUNS = [run for run in itertools.product(DTYPES, IMPLS) if run != (torch.float64, "triton")]


@pytest.mark.parametrize(("dtype", "impl"), RUNS, ids=str)
@pytest.mark.parametrize("divergence", [ForwardKL(), SkewKL(0.01)], ids=repr)
@pytest.mark.parametrize(("form", "transform"), CASES, ids=str)
@pytest.mark.interpreted(4)
def test_given_logits(form: str, dtype: torch.dtype, transform, divergence, impl: Impl) -> None:
    scale, softcap = transform
    teacher, log_p_t = teacher_of(form, dtype, torch.zeros(VOCABULARY, WIDTH))
    student = (4.0 * torch.randn(ROWS, VOCABULARY, device=DEVICE)).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (ROWS,), device=DEVICE)
    options = {"divergence": divergence, "temperature": TEMPERATURE, "ce_weight": CE_WEIGHT, "impl": impl}
    options["kd_weight"] = 0.0 if form == "labels" else 1.0
    rows = kd_loss(student, teacher, labels, reduction="none", logit_scale=scale, softcap=softcap, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    leaf = student.detach().double().requires_grad_()
    logits = transformed(leaf, scale, softcap)
    exact = by_hand(logits, log_p_t, teacher, labels, divergence)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), leaf)
    size = max(1.0, logits.detach().abs().max().item())
    truncates = impl == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu"
    assert_rounded_once(rows, gradient, exact.detach(), exact_gradient, size, abs(scale), truncates)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("form", "transform"), ROUNDED, ids=str)
def test_rounded_logits_are_transformed_in_float32(form: str, transform, bias: bool, impl: Impl) -> None:
    """`logit_dtype` rounds what comes out of the matmul, once: bias, scale and softcap see that number in float32."""
    scale, softcap = transform
    weight = torch.randn(VOCABULARY, WIDTH, device=DEVICE).bfloat16()
    hidden = torch.randn(ROWS, WIDTH, device=DEVICE).bfloat16()
    student_bias = 8.0 * torch.randn(VOCABULARY, device=DEVICE) if bias else None
    teacher, log_p_t = teacher_of(form, torch.bfloat16, weight)
    assert log_p_t is not None or form == "labels"
    if isinstance(teacher, TeacherCrossTerm) and log_p_t is not None and student_bias is not None:
        teacher = replace(teacher, bias=(log_p_t.exp() @ student_bias.double()).float())
    labels = torch.randint(VOCABULARY, (ROWS,), device=DEVICE)
    rows = linear_kd_loss(
        hidden,
        weight,
        teacher,
        labels,
        student_bias=student_bias,
        temperature=TEMPERATURE,
        ce_weight=CE_WEIGHT,
        kd_weight=0.0 if form == "labels" else 1.0,
        logit_scale=scale,
        softcap=softcap,
        logit_dtype=torch.bfloat16,
        reduction="none",
        impl=impl,
    )
    rounded = (hidden.float() @ weight.float().T).bfloat16().double()
    if student_bias is not None:
        rounded = rounded + student_bias.double()
    logits = transformed(rounded, scale, softcap)
    exact = by_hand(logits, log_p_t, teacher, labels, ForwardKL())
    if isinstance(teacher, TeacherCrossTerm) and log_p_t is not None:
        # The average of the teacher is taken of logits that are not rounded, so it is here.
        mean = (hidden.double() * teacher.cross.double()).sum(1) + teacher.bias.double()
        exact = exact + TEMPERATURE * ((log_p_t.exp() * rounded).sum(1) - mean) * scale
    size = max(1.0, logits.abs().max().item())
    assert_rounded_once(rows, rows, exact, exact, size, abs(scale), False)
