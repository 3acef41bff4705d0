"""Inputs that break losses: shifted logits, infinite logits, a student next to its teacher, and identities."""

import math

import pytest
import torch
from torch import Tensor

from kdkernels import JSD, AlphaBeta, ChiSquared, ForwardKL, Renyi, ReverseKL, kd_loss, linear_kd_loss
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, DIVERGENCES, IMPLS, eager_row_losses, make_case, solve
from tests.support.rounding import truths


def pair(rows: int = 6, classes: int = 131, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(2, rows, classes) * scale).to(DEVICE)
    return student, teacher


def eager(student: Tensor, teacher: Tensor, divergence) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    rows = eager_row_losses(student, teacher, None, divergence=divergence)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient


def assert_close_to_fp64(student: Tensor, teacher: Tensor, divergence, impl: Impl) -> None:
    wide = student.double(), teacher.double()
    truth = truths(lambda: eager(*wide, divergence))
    ours = solve(student, teacher, impl, divergence=divergence)
    assert_within_budget(ours[0], truth[0], "rows")
    assert_within_budget(ours[1], truth[1], "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
# Both rows shifted far up or down, far apart from each other, and just inside and outside of exp's range.
@pytest.mark.parametrize(
    ("up", "down"), [(100.0, 100.0), (-100.0, -100.0), (100.0, -50.0), (25.0, -15.0), (9e3, 0.0)]
)
@pytest.mark.interpreted(3)
def test_shifted_logits(up, down, divergence, impl: Impl) -> None:
    student, teacher = pair()
    assert_close_to_fp64(student + up, teacher + down, divergence, impl)


@pytest.mark.parametrize("impl", IMPLS)
# Chi-squared, a quotient of probabilities, leaves float32 there: see the test after this one.
@pytest.mark.parametrize("divergence", [case for case in DIVERGENCES if case != ChiSquared()], ids=repr)
# Logit gaps of hundreds: most probabilities underflow to 0.
@pytest.mark.parametrize("scale", [40.0, 400.0])
def test_peaked_rows(scale, divergence, impl: Impl) -> None:
    student, teacher = pair(scale=scale)
    assert_close_to_fp64(student, teacher, divergence, impl)


@pytest.mark.parametrize("impl", IMPLS)
# Both sides of 1, and the square root of the product, which is symmetric.
@pytest.mark.parametrize("alpha", [0.5, 0.2, 3.0])
def test_renyi_of_three_known_distributions(alpha: float, impl: Impl) -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.25]], device=DEVICE).log()
    student = torch.tensor([[0.25, 0.25, 0.5]], device=DEVICE).log()
    total = 0.5**alpha * 0.25 ** (1 - alpha) + 0.25 + 0.25**alpha * 0.5 ** (1 - alpha)
    value = kd_loss(student, teacher, divergence=Renyi(alpha), impl=impl)
    assert value.item() == pytest.approx(math.log(total) / (alpha - 1.0), rel=2e-6)
    # Near 1 it is forward KL, up to the first order in alpha - 1.
    forward = kd_loss(student, teacher, impl=impl).item()
    near = [kd_loss(student, teacher, divergence=Renyi(a), impl=impl).item() for a in (0.98, 1.02)]
    assert sum(near) / 2 == pytest.approx(forward, rel=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
# Logits that are up to 60, 240 and 2400 apart.
@pytest.mark.parametrize("scale", [10.0, 40.0, 400.0])
def test_chi_squared_is_infinite_beyond_float32_and_right_below(scale, impl: Impl) -> None:
    """Quotients of probabilities that both underflow count as well."""
    student, teacher = pair(scale=scale)
    log_p_s, log_p_t = (logits.double().log_softmax(-1) for logits in (student, teacher))
    log_ratio = log_p_t - log_p_s
    exact = (2.0 * log_p_t - log_p_s).exp().sum(-1) - 1.0
    exact[log_ratio.exp().amax(-1) > torch.finfo(torch.float32).max] = math.inf
    rows = kd_loss(student, teacher, divergence=ChiSquared(), reduction="none", impl=impl)
    # The relative error of a quotient is the rounding of its logarithm, on both sides and of their difference.
    torch.testing.assert_close(
        rows.double(), exact, rtol=3 * log_ratio.abs().max().item() * 2.0**-24, atol=0.0
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@pytest.mark.interpreted(5)
def test_student_next_to_its_teacher(distance, divergence, impl: Impl) -> None:
    """The loss is tiny here, and most of it is lost when it is a difference of two large numbers."""
    teacher, noise = pair(rows=24)
    assert_close_to_fp64(teacher + distance * noise, teacher, divergence, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "divergence", [case for case in DIVERGENCES if not isinstance(case, ReverseKL)], ids=repr
)
def test_teacher_forbids_some_entries(divergence, impl: Impl) -> None:
    """-inf in the teacher is probability 0: the value is that of the sum over the other entries."""
    student, teacher = pair()
    teacher[:, ::5] = -math.inf
    teacher[2, 2:] = -math.inf  # a teacher that is certain
    # Eager code makes NaN of 0 * inf; -1e4 has the same probability.
    exact, exact_gradient = eager(student.double(), teacher.clamp(min=-1e4).double(), divergence)
    rows, gradient = solve(student, teacher, impl, divergence=divergence)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_both_forbid_the_same_entries(divergence, impl: Impl) -> None:
    """Padded vocabulary entries masked on both sides change nothing."""
    student, teacher = pair(classes=40)
    expected, expected_gradient = solve(student, teacher, impl, divergence=divergence)
    padding = torch.full((6, 9), -math.inf, device=DEVICE)
    rows, gradient = solve(
        torch.cat((student, padding), 1), torch.cat((teacher, padding), 1), impl, divergence=divergence
    )
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(gradient[:, :40], expected_gradient)
    assert torch.equal(gradient[:, 40:], torch.zeros_like(gradient[:, 40:]))


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_divergence_is_infinite(impl: Impl) -> None:
    """Where the teacher says impossible and the student does not, reverse KL has no finite value."""
    student, teacher = pair()
    teacher[1, 3] = -math.inf
    rows = kd_loss(student, teacher, divergence="reverse_kl", reduction="none", impl=impl)
    assert rows[1].item() == math.inf
    assert rows[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_identities(divergence, impl: Impl) -> None:
    student, teacher = pair()
    same, gradient = solve(teacher, teacher, impl, divergence=divergence)
    # Alpha-beta divides a difference of sums near 1 by alpha beta, and its rounding with it.
    size = 1.0 / (divergence.alpha * divergence.beta) if isinstance(divergence, AlphaBeta) else 1.0
    assert same.abs().max().item() < 1e-6 * size
    assert gradient.abs().max().item() < 1e-6

    rows, gradient = solve(student, teacher, impl, divergence=divergence)
    assert (rows > 0).all()
    # Adding a constant to a row of logits changes no distribution.
    moved, _ = solve(student + 2.0, teacher - 3.0, impl, divergence=divergence)
    torch.testing.assert_close(moved, rows, rtol=1e-4, atol=1e-5)
    # And so the gradient has no component along it.
    largest = max(1.0, gradient.abs().max().item())  # of which a sum keeps the rounding
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, device=DEVICE), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("impl", IMPLS)
def test_relations_between_divergences(impl: Impl) -> None:
    student, teacher = pair()

    def value(first: Tensor, second: Tensor, divergence) -> Tensor:
        return kd_loss(first, second, divergence=divergence, reduction="none", impl=impl)

    forward = value(student, teacher, ForwardKL())
    torch.testing.assert_close(value(teacher, student, ReverseKL()), forward)
    torch.testing.assert_close(value(student, teacher, JSD()), value(teacher, student, JSD()))
    torch.testing.assert_close(value(student, teacher, JSD(0.2)), value(teacher, student, JSD(0.8)))
    assert (value(student, teacher, JSD()) <= math.log(2.0)).all()
    # Near its ends JSD behaves as beta KL(p_t, p_s), and not as the KL itself.
    near = teacher + 0.1 * student
    small = value(near, teacher, JSD(1e-3)) / 1e-3
    torch.testing.assert_close(small, value(near, teacher, ForwardKL()), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_t_squared_multiplies_value_and_gradient(divergence, impl: Impl) -> None:
    student, teacher = pair()
    options = {"divergence": divergence, "temperature": 3.0}
    scaled, scaled_gradient = solve(student, teacher, impl, **options)
    plain, plain_gradient = solve(student, teacher, impl, t_squared=False, **options)
    torch.testing.assert_close(scaled, 9.0 * plain)
    torch.testing.assert_close(scaled_gradient, 9.0 * plain_gradient)
    at_one, at_one_gradient = solve(student / 3.0, teacher / 3.0, impl, divergence=divergence)
    torch.testing.assert_close(plain, at_one)
    torch.testing.assert_close(plain_gradient, at_one_gradient / 3.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_the_two_terms(impl: Impl) -> None:
    case = make_case(ignored_every=None)
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    kd = linear_kd_loss(*arguments, temperature=2.0, impl=impl)
    ce = linear_kd_loss(*arguments, temperature=2.0, kd_weight=0.0, ce_weight=1.0, impl=impl)
    logits = case.student_hidden @ case.student_weight.t()
    torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(logits, case.labels))
    both = linear_kd_loss(*arguments, temperature=2.0, kd_weight=0.3, ce_weight=0.7, impl=impl)
    torch.testing.assert_close(both, 0.3 * kd + 0.7 * ce)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_the_highest_temperature(divergence, impl: Impl) -> None:
    """T squared times a divergence of 1 / T^2: all its digits are differences of log-probabilities near log V.

    A log-probability of 4 is off by two roundings, a row averages V of them: 2 * 4 u T^2 = 5e-3 at most, of 2 to 6.
    Alpha-beta is a difference of sums of powers, each off by as much, divided by alpha * beta. Rényi's is the logarithm of a
    sum of exp(alpha log p_t + (1 - alpha) log p_s), off by as many of both logs and by one for itself, over alpha - 1.
    """
    student, teacher = 3.0 * torch.randn(4, 67, device=DEVICE), 2.0 * torch.randn(4, 67, device=DEVICE)
    options = {"divergence": divergence, "temperature": 100.0}
    exact, exact_gradient = solve(student.double(), teacher.double(), "reference", **options)
    rows, gradient = solve(student, teacher, impl, **options)
    divided_by = divergence.alpha * divergence.beta if isinstance(divergence, AlphaBeta) else 1.0
    logs, slope = 1.0, 1.0
    if isinstance(divergence, Renyi):
        slope = abs(divergence.alpha - 1.0)
        logs = divergence.alpha + slope + 1.0
    assert (rows - exact).abs().max().item() <= 8 * 2.0**-24 * 100.0**2 * logs / slope / divided_by
    # T (p_s - p_t): probabilities of 1 / V, each off by 8 roundings of itself.
    assert (gradient - exact_gradient).abs().max().item() <= 100.0 * 8 * 2.0**-24 * (
        1 + logs
    ) / 67 / divided_by
