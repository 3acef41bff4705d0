"""kd_weight 0: cross entropy alone, for which no teacher is read."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import (
    Decoupled,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS, Case, make_case
from tests.support.rounding import truths

NAN = math.nan
# Plain, and everything that changes what the cross entropy is of: bias, scale and softcap come with the second.
PLAIN = {"kd_weight": 0.0, "ce_weight": 0.7}
OPTIONS = {**PLAIN, "label_smoothing": 0.1, "temperature": 2.0, "softcap": 6.0, "logit_scale": 0.8}


def silent(rows: int, vocabulary: int) -> TeacherLogits:
    return TeacherLogits(torch.full((), NAN, device=DEVICE).expand(rows, vocabulary))


def linear(case: Case, **options) -> tuple[Tensor, ...]:
    """The loss, and the gradients of its sum with respect to hidden states, weight and bias."""
    hidden, weight, bias = case.leaves()
    teacher = silent(len(hidden), len(weight))
    loss = linear_kd_loss(hidden, weight, teacher, case.labels, student_bias=bias, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight, bias))


def poisoned(case: Case, smoothing: bool) -> Case:
    """NaN in ignored rows, and tokens that the student excludes unless smoothing would make that infinite."""
    case.student_hidden[case.labels == -100] = NAN
    if not smoothing:
        case.student_bias[[5, 60]] = -math.inf
        case.labels[(case.labels == 5) | (case.labels == 60)] = 7
    return case


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "all"])
# Gradient in forward; in backward; ignored rows left in.
@pytest.mark.parametrize(
    "more", [{}, {"reduction": "none"}, {"static_shapes": True}], ids=["mean", "none", "static"]
)
@pytest.mark.interpreted(5)
def test_linear_loss(more, options, dtype, impl: Impl) -> None:
    case = poisoned(make_case(dtype=dtype), smoothing="softcap" in options)
    wide = case.to(torch.float64)
    exact = truths(lambda: linear(wide, impl="reference", **options, **more))
    found = linear(case, impl=impl, **options, **more)
    for name, ours, truth in zip(("loss", "hidden", "weight", "bias"), found, exact, strict=True):
        assert_within_budget(ours, truth, name)


@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "all"])
def test_float64(options) -> None:
    case = poisoned(make_case(dtype=torch.float64), smoothing="softcap" in options)
    found = linear(case, impl="torch", **options)
    torch.testing.assert_close(found, linear(case, impl="reference", **options), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "all"])
def test_given_logits_are_only_read(options, dtype, impl: Impl) -> None:
    case = make_case(rows=10, dtype=dtype)
    weight = torch.rand(10, device=DEVICE)
    weight[2] = 0.0
    student = case.student_logits.detach()
    student[3] += 200.0  # its exponentials leave float32
    student[case.labels == -100] = NAN
    student[2] = math.inf

    def solve(logits: Tensor, way: Impl) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        loss = kd_loss(leaf, silent(10, 67), case.labels, token_weight=weight, impl=way, **options)
        assert torch.equal(leaf.detach().nan_to_num(), logits.nan_to_num())
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    wide = student.double()
    exact = truths(lambda: solve(wide, "reference"))
    for name, ours, truth in zip(("loss", "logits"), solve(student, impl), exact, strict=True):
        assert_within_budget(ours, truth, name)


@pytest.mark.parametrize("impl", IMPLS)
# Every form that a teacher comes in, and a divergence that needs labels.
@pytest.mark.parametrize("form", ["logits", "head", "top_k", "cross_term", "low_memory", "decoupled"])
def test_no_teacher_is_read(form: str, impl: Impl) -> None:
    case = make_case()
    rows, vocabulary = case.student_logits.shape
    options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "impl": impl, "check_finite": True}
    teacher = TeacherHead(case.teacher_hidden, torch.full_like(case.teacher_weight, NAN))
    if form in ("logits", "decoupled"):
        teacher = silent(rows, vocabulary)
    elif form == "top_k":
        teacher = TeacherTopK(
            torch.full((rows, 3), NAN, device=DEVICE), torch.arange(3, device=DEVICE).expand(rows, 3)
        )
    elif form == "cross_term":
        nothing = torch.full((rows,), NAN, device=DEVICE)
        case = replace(case, student_weight=case.student_weight.detach())
        teacher = TeacherCrossTerm(
            torch.full((rows, 8), NAN, device=DEVICE), nothing, nothing, temperature=1.0
        )
    if form == "low_memory" and impl != "reference":
        options["mode"] = "low_memory"
    if form == "decoupled":
        options["divergence"] = Decoupled()
    hidden, weight, _ = case.leaves()
    weight.requires_grad_(form != "cross_term")
    loss = linear_kd_loss(hidden, weight, teacher, case.labels, **options)
    loss.backward()
    ours, hidden.grad = hidden.grad, None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), case.labels)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    torch.testing.assert_close(ours, hidden.grad)
    # What the student does is still looked at, and the teacher is not blamed for it.
    hidden.data[6] = NAN
    with pytest.raises(FloatingPointError, match=r"^row 6 has no finite softmax for the student:"):
        linear_kd_loss(hidden, weight, teacher, case.labels, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_to_learn(dtype, labelled: bool, impl: Impl) -> None:
    case = make_case(dtype=dtype)
    labels = case.labels if labelled else None
    leaves, logits = case.leaves(), case.student_logits.detach().requires_grad_()
    for loss, of in (
        (
            linear_kd_loss(
                *leaves[:2], case.teacher, labels, student_bias=leaves[2], kd_weight=0.0, impl=impl
            ),
            leaves,
        ),
        (kd_loss(logits, case.teacher, labels, kd_weight=0.0, impl=impl), [logits]),
    ):
        assert loss.item() == 0.0
        for gradient in torch.autograd.grad(loss, of):
            assert not gradient.any() and gradient.isfinite().all()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_statistics_still_read_it(impl: Impl) -> None:
    case = make_case()
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "impl": impl}
    plain = linear_kd_loss(*arguments, **options)
    loss, stats = linear_kd_loss(*arguments, return_stats=True, **options)
    torch.testing.assert_close(loss, plain)
    assert stats.kd[case.labels != -100].gt(0).all()
