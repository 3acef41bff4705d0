"""The teacher as a cross-term of a frozen student head: the same loss and gradient without a teacher in the step."""

import pytest
import torch

from kdkernels import TeacherCrossTerm, TeacherHead, linear_kd_loss, teacher_cross_term
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, IMPLS, make_case


@pytest.mark.parametrize("impl", IMPLS)
# Alone and with a cross entropy, which shares the softmax at temperature 1; per token and as a mean.
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.6), (2.0, 0.6)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_the_teacher(reduction, temperature, ce_weight, impl: Impl) -> None:
    case = make_case(dtype=torch.float64 if impl != "triton" else torch.float32)
    teacher = TeacherHead(case.teacher_hidden, case.teacher_weight, case.teacher_bias, softcap=4.0, scale=1.3)
    cached = teacher_cross_term(teacher, case.student_weight, case.student_bias, temperature=temperature)
    assert isinstance(cached, TeacherCrossTerm)
    options = {
        "student_bias": case.student_bias, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": 0.1,
        "logit_scale": 0.7, "reduction": reduction, "impl": impl,
    }  # fmt: skip
    weight = torch.rand(13, device=DEVICE)
    results = []
    for form in (teacher, cached):
        hidden = case.student_hidden.clone().requires_grad_()
        loss = linear_kd_loss(
            hidden, case.student_weight, form, case.labels, token_weight=weight, kd_weight=0.8, **options
        )
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), hidden)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_do_not_count_may_hold_anything(impl: Impl) -> None:
    case = make_case()
    cached = teacher_cross_term(case.teacher_logits, case.student_weight)
    good = linear_kd_loss(case.student_hidden, case.student_weight, cached, case.labels, impl=impl)
    dead = case.labels == -100
    hidden = case.student_hidden.masked_fill(dead.unsqueeze(1), float("nan")).requires_grad_()
    spoiled = TeacherCrossTerm(
        cached.cross.masked_fill(dead.unsqueeze(1), float("inf")),
        cached.bias.masked_fill(dead, float("nan")),
        cached.entropy.masked_fill(dead, float("nan")),
        cached.temperature,
    )
    for static_shapes in (False, True):
        loss = linear_kd_loss(
            hidden, case.student_weight, spoiled, case.labels, static_shapes=static_shapes, impl=impl
        )
        torch.testing.assert_close(loss, good)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert torch.equal(gradient[dead], torch.zeros_like(gradient[dead]))
        assert gradient.isfinite().all()


def test_what_is_kept() -> None:
    case = make_case(rows=600)  # several chunks
    cached = teacher_cross_term(
        case.teacher, case.student_weight.bfloat16(), case.student_bias, temperature=2.0
    )
    p = (case.teacher_logits.double() / 2.0).softmax(-1)
    assert cached.cross.dtype == torch.float32 and cached.temperature == 2.0
    torch.testing.assert_close(
        cached.cross.double(), p @ case.student_weight.bfloat16().double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(cached.bias.double(), p @ case.student_bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"student_weight must have shape \(67, D_s\), one row per entry"):
        teacher_cross_term(case.teacher, case.student_weight[:60])
    with pytest.raises(ValueError, match=r"student_bias must have shape \(67,\), got \(66,\)"):
        teacher_cross_term(case.teacher, case.student_weight, case.student_bias[:66])
    cached = teacher_cross_term(case.teacher, case.student_weight)
    with pytest.raises(
        ValueError, match="a cross-term is an average over the whole vocabulary, got TeacherCrossTerm"
    ):
        teacher_cross_term(cached, case.student_weight)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("impl", IMPLS)
def test_of_no_rows(impl: Impl) -> None:
    hidden, weight = torch.zeros(2, 0, 3, device=DEVICE).requires_grad_(), torch.randn(9, 3, device=DEVICE)
    cached = teacher_cross_term(torch.zeros(2, 0, 9, device=DEVICE), weight)
    assert cached.cross.shape == (2, 0, 3)
    loss = linear_kd_loss(hidden, weight, cached, impl=impl)
    loss.backward()
    assert loss == 0
