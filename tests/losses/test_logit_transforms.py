"""Softcap and logit scale on either side: the loss is that of the transformed logits, the gradient that of the raw ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdkernels import JSD, ForwardKL, kd_loss, linear_kd_loss
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, IMPLS, eager_row_losses, make_case
from tests.support.rounding import truths


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return logits * scale if softcap is None else torch.tanh(logits * scale / softcap) * softcap


def eager(case, student: tuple, teacher: tuple, **options) -> tuple[Tensor, ...]:
    """Mean loss and the gradients of student hidden states, head and bias, in the case's dtype."""
    hidden, weight, bias = case.leaves()
    logits = transformed(torch.nn.functional.linear(hidden, weight, bias), *student)
    rows = eager_row_losses(logits, transformed(case.teacher_logits, *teacher), case.labels, **options)
    loss = rows.sum() / int((case.labels != -100).sum())
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))


@pytest.mark.parametrize("impl", IMPLS)
# Scale alone, cap alone, both; caps that bite (logits spread by 3) and one that hardly does.
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((0.5, None), (1.0, None)),
        ((1.0, 4.0), (2.0, 30.0)),
        ((0.7, 5.0), (1.0, None)),
        ((1.0, None), (0.3, 3.0)),
    ],
)
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.interpreted(3)
def test_values_and_gradients(dtype, divergence, student, teacher, impl: Impl) -> None:
    case = make_case(dtype=dtype)
    options = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.5}
    wide = case.to(torch.float64)
    truth = truths(lambda: eager(wide, student, teacher, **options))
    hidden, weight, bias = case.leaves()
    loss = linear_kd_loss(
        hidden,
        weight,
        replace(case.teacher, scale=teacher[0], softcap=teacher[1]),
        case.labels,
        student_bias=bias,
        logit_scale=student[0],
        softcap=student[1],
        impl=impl,
        **options,
    )
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    for name, ours, exact in zip(
        ("mean", "hidden", "weight", "bias"), (loss, *gradients), truth, strict=True
    ):
        assert_within_budget(ours, exact, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_logits_as_they_are_given(label_smoothing, impl: Impl) -> None:
    """`kd_loss` transforms the student's logits; stored teacher logits are taken as they are."""
    case = make_case(ignored_every=None)
    options = {"ce_weight": 0.5, "label_smoothing": label_smoothing, "impl": impl}
    raw = (3.0 * case.student_logits).requires_grad_()
    loss = kd_loss(raw, case.teacher_logits, case.labels, logit_scale=0.6, softcap=6.0, **options)
    again = raw.detach().clone().requires_grad_()
    other = kd_loss(transformed(again, 0.6, 6.0), case.teacher_logits, case.labels, **options)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, leaf)[0] for one, leaf in ((loss, raw), (other, again)))
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_capped_infinity_is_the_cap(impl: Impl) -> None:
    student = torch.tensor([[1.0, -float("inf"), 2.0]], device=DEVICE)
    teacher = torch.tensor([[0.5, 1.0, -1.0]], device=DEVICE)
    capped = kd_loss(student, teacher, softcap=2.0, impl=impl)
    finite = kd_loss(student.clamp(min=-1e4), teacher, softcap=2.0, impl=impl)
    torch.testing.assert_close(capped, finite)
