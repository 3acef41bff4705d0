"""Divergences one by one: limits of alpha-beta, identities between them, the decoupled divergence."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import (
    JSD,
    TVD,
    AlphaBeta,
    Decoupled,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherTopK,
    linear_kd_loss,
)
from kdkernels.options import Impl, Mode
from tests.support.budget import assert_within_budget
from tests.support.inputs import (
    DEVICE,
    FAST_IMPLS,
    IMPLS,
    eager_row_losses,
    loss_and_gradients,
    make_case,
    solve,
    true_linear_kd,
)
from tests.support.rounding import truths

# Every branch of the formula: alpha, beta, both and their sum at 0, and powers below 0.
LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.5), (0.4, -0.4), (-0.4, 0.4), (0.0, 0.0), (-0.3, 0.8)]


def pair(rows: int = 6, classes: int = 67) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(2, rows, classes) * 2).to(DEVICE)
    return student, teacher


def limit(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """The formula of alpha-beta close to (alpha, beta), where it still has digits in fp64 (error of order 1e-8)."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)

    def value(a: float, b: float) -> Tensor:
        terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -terms.sum(-1) / (a * b)

    # The mean of both sides: what is of first order in the step cancels.
    step = 1e-4
    return (value(alpha + step, beta + step / 3) + value(alpha - step, beta - step / 3)) / 2


class Unknown(Divergence):
    """A divergence that promises nothing."""

    def __repr__(self) -> str:
        return "Unknown()"


def test_a_divergence_that_promises_nothing_is_refused() -> None:
    """Nothing runs a divergence it has no formula for, and no schedule takes one that does not say that it may."""
    case = make_case()
    top_k = TeacherTopK(*case.teacher_logits.log_softmax(-1).topk(4))
    arguments = (case.student_hidden, case.student_weight)
    for impl in IMPLS:
        with pytest.raises(NotImplementedError, match=r"Unknown\(\)"):
            linear_kd_loss(*arguments, case.teacher, divergence=Unknown(), impl=impl)
    with pytest.raises(NotImplementedError, match=r"^Unknown\(\) is not supported with mode='low_memory'"):
        linear_kd_loss(*arguments, case.teacher, divergence=Unknown(), mode="low_memory")
    with pytest.raises(
        ValueError, match=r"^Unknown\(\) cannot be used with TeacherTopK\(tail='renormalize'\)"
    ):
        linear_kd_loss(*arguments, top_k, divergence=Unknown())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [AlphaBeta(*powers) for powers in LIMITS], ids=repr)
def test_limits_of_alpha_beta(divergence: AlphaBeta, impl: Impl) -> None:
    student, teacher = pair()
    exact_student = student.double().requires_grad_()
    exact = limit(exact_student, teacher, divergence.alpha, divergence.beta)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_student)
    rows, gradient = solve(student, teacher, impl, divergence=divergence)
    torch.testing.assert_close(rows.double(), exact.detach(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
# Pairs that are one and the same function.
@pytest.mark.parametrize(
    ("divergence", "other"),
    [(AlphaBeta(1.0, 0.0), ForwardKL()), (AlphaBeta(0.0, 1.0), ReverseKL())],
    ids=repr,
)
def test_alpha_beta_holds_the_kls(divergence: Divergence, other: Divergence, impl: Impl) -> None:
    student, teacher = pair()
    rows, gradient = solve(student, teacher, impl, divergence=divergence, temperature=2.0)
    expected, expected_gradient = solve(student, teacher, impl, divergence=other, temperature=2.0)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [SkewKL(0.5)], ids=repr)
def test_half_a_skew_of_each_is_jsd(divergence: SkewKL, impl: Impl) -> None:
    student, teacher = pair()
    forward, forward_gradient = solve(student, teacher, impl, divergence=divergence)
    backward, backward_gradient = solve(student, teacher, impl, divergence=SkewReverseKL(0.5))
    whole, gradient = solve(student, teacher, impl, divergence=JSD(0.5))
    torch.testing.assert_close((forward + backward) / 2, whole)
    torch.testing.assert_close((forward_gradient + backward_gradient) / 2, gradient)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [TVD()], ids=repr)
def test_tvd_is_at_most_one_and_symmetric(divergence: TVD, impl: Impl) -> None:
    student, teacher = pair()
    rows, _ = solve(40 * student, 40 * teacher, impl, divergence=divergence)
    assert (rows <= 1.0 + 1e-6).all()
    there, _ = solve(student, teacher, impl, divergence=divergence)
    back, _ = solve(teacher, student, impl, divergence=divergence)
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "divergence", [Decoupled(1.0, 2.0), Decoupled(0.0, 1.0), Decoupled(3.0, 0.0)], ids=str
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.interpreted(5)
def test_decoupled(dtype, temperature, divergence: Decoupled, impl: Impl) -> None:
    case = make_case(dtype=dtype)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.5}
    truth = true_linear_kd(case, case.labels, **options)
    loss, *gradients = loss_and_gradients(case, case.labels, impl, **options)
    assert_within_budget(loss, truth[1], "mean")
    for ours, exact in zip(gradients, truth[2:], strict=True):
        assert_within_budget(ours, exact, "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [Decoupled()], ids=["decoupled"])
def test_weights_of_decoupled_per_token(divergence: Decoupled, impl: Impl) -> None:
    """Forward KL is TKD + (1 - p_t[label]) NCKD: with these weights per token the two losses are one."""
    case = make_case()
    p_label = case.teacher_logits.softmax(-1).gather(1, case.labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    p_label[case.labels == -100] = math.nan  # weights of rows that do not count are not looked at
    split = Decoupled(divergence.target, 1.0 - p_label)
    ours = loss_and_gradients(case, case.labels, impl, divergence=split)
    plain = loss_and_gradients(case, case.labels, impl, divergence=ForwardKL())
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    rows = linear_kd_loss(*arguments, divergence=split, reduction="none", impl=impl)
    torch.testing.assert_close(
        rows, linear_kd_loss(*arguments, reduction="none", impl=impl), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [Decoupled(1.0, 1.0)], ids=["decoupled"])
def test_decoupled_near_certainty(divergence: Decoupled, impl: Impl) -> None:
    """Both models nearly certain of the label: 1 - p has no digits, the sum over the others has."""
    student, teacher = pair()
    labels = torch.arange(6, device=DEVICE)
    student[labels, labels] += 25.0
    teacher[labels, labels] += 24.0
    leaf, exact_teacher = student.double().requires_grad_(), teacher.double()

    def eager() -> tuple[Tensor, ...]:
        rows = eager_row_losses(leaf, exact_teacher, labels, divergence=divergence)
        return rows, *torch.autograd.grad(rows.sum(), leaf)

    exact, exact_gradient = truths(eager)
    rows, gradient = solve(student, teacher, impl, divergence=divergence, labels=labels)
    assert_within_budget(rows, exact, "rows")
    assert_within_budget(gradient, exact_gradient, "gradient")
    # A teacher that gives the label everything has nothing to say about the others.
    certain = torch.full_like(teacher, -math.inf)
    certain[labels, labels] = 0.0
    rows, gradient = solve(student, certain, impl, divergence=divergence, labels=labels)
    cross_entropy = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(rows, cross_entropy, rtol=1e-4, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD()], ids=repr)
def test_label_smoothing(divergence, temperature, smoothing, impl: Impl) -> None:
    case = make_case()
    options = {
        "divergence": divergence, "temperature": temperature, "ce_weight": 0.5, "label_smoothing": smoothing
    }  # fmt: skip
    truth = true_linear_kd(case, case.labels, **options)
    loss, *gradients = loss_and_gradients(case, case.labels, impl, **options)
    assert_within_budget(loss, truth[1], "mean")
    for ours, exact in zip(gradients, truth[2:], strict=True):
        assert_within_budget(ours, exact, "gradient")


# In both modes, of which the second takes tiles of the columns.
@pytest.mark.parametrize("mode", ["fast", "low_memory"])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_decoupled_from_a_teacher_that_gives_the_others_nothing(impl: Impl, mode: Mode) -> None:
    """NCKD is 0 there, and so is its part of the gradient; TKD is not."""
    width = 7 if mode == "fast" else 150  # one row, and a tile of 128 columns with a ragged second one
    hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(width, 4, device=DEVICE)
    labels = torch.tensor([1, 2, width - 1], device=DEVICE)
    teacher = torch.full((3, width), -math.inf, device=DEVICE)
    teacher[0, 1] = teacher[1, 2] = 0.0
    teacher[2] = torch.randn(width)
    results = []
    each: list[dict[str, Any]] = [
        {"impl": "reference"},
        {"impl": impl, "mode": mode, "chunk_bytes": 8 * min(width, 128)},
    ]
    for options in each:
        leaf = hidden.clone().requires_grad_()
        loss = linear_kd_loss(leaf, weight, teacher, labels, divergence=Decoupled(1.0, 2.0), **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for ours, exact in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
# Every branch in which a power is below 0, where 0 to that power meets 0 to another.
@pytest.mark.parametrize("divergence", [AlphaBeta(-0.5, 0.7), AlphaBeta(0.5, -0.2)], ids=repr)
def test_alpha_beta_leaves_out_what_both_sides_exclude(divergence: AlphaBeta, impl: Impl) -> None:
    student, teacher = pair(classes=9)
    wide_student, wide_teacher = (F.pad(side, (1, 2), value=-math.inf) for side in (student, teacher))
    rows, gradient = solve(wide_student, wide_teacher, impl, divergence=divergence)
    expected, expected_gradient = solve(student, teacher, impl, divergence=divergence)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, 1:10], expected_gradient, rtol=1e-5, atol=1e-6)
