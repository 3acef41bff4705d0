"""Teachers of which the top k was kept: both tails, every divergence that has a value there, against fp64 by hand."""

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
    ChiSquared,
    Divergence,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from kdkernels.options import Impl
from kdkernels.teachers import MIN_BUCKET_PROB, Tail
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, IMPLS, eager_divergence, make_case
from tests.support.rounding import truths

KEPT = 6
RENORMALIZED: list[Divergence] = [
    ForwardKL(),
    JSD(0.3),
    SkewKL(0.1),
    SkewReverseKL(0.2),
    TVD(),
    AlphaBeta(0.6, 0.4),
    ChiSquared(),
    Renyi(0.6),
]
BUCKETED: list[Divergence] = [*RENORMALIZED, ReverseKL(), AlphaBeta(0.3, 0.6)]
CASES: list[tuple[Divergence, Tail]] = [
    *[(divergence, "renormalize") for divergence in RENORMALIZED],
    *[(divergence, "bucket") for divergence in BUCKETED],
]


def top_k(logits: Tensor, tail: Tail, count: int = KEPT) -> TeacherTopK:
    """The best entries of each row, shuffled."""
    logprobs, indices = logits.float().log_softmax(-1).topk(count)
    order = torch.randperm(count, device=logits.device)
    return TeacherTopK(logprobs[:, order], indices[:, order], tail)


def distributions(student: Tensor, teacher: TeacherTopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides, row by row, as the docstring of `TeacherTopK` defines them."""
    log_s, log_t = [], []
    for logits, logprobs, ids in zip(
        student, teacher.logprobs.to(student.dtype), teacher.indices, strict=True
    ):
        if teacher.tail == "renormalize":
            row = torch.full_like(logits, -1e4)
            row[ids] = (logprobs / temperature).log_softmax(0)
            log_s.append((logits / temperature).log_softmax(0))
            log_t.append(row)
            continue
        others = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        others[ids] = False
        log_p = logits.log_softmax(0)
        mine = torch.cat((log_p[ids], log_p[others].logsumexp(0, keepdim=True)))
        its = torch.cat((logprobs, (1.0 - logprobs.exp().sum()).clamp_min(1e-30).log().unsqueeze(0)))
        log_s.append((mine / temperature).log_softmax(0))
        log_t.append((its / temperature).log_softmax(0))
    return torch.stack(log_s), torch.stack(log_t)


def by_hand(
    student: Tensor, teacher: TeacherTopK, labels: Tensor, divergence, temperature, ce_weight
) -> Tensor:
    """One loss per row."""
    value = temperature**2 * eager_divergence(*distributions(student, teacher, temperature), divergence)
    ce = F.cross_entropy(student, labels, reduction="none", label_smoothing=0.1)
    return (value + ce_weight * ce).masked_fill(labels == -100, 0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.6)])
@pytest.mark.parametrize(("divergence", "tail"), CASES, ids=str)
@pytest.mark.interpreted(5)
def test_values_and_gradients(divergence, tail, temperature, ce_weight, impl: Impl) -> None:
    case = make_case()
    teacher = top_k(case.teacher_logits, tail)
    terms = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}

    def eager() -> tuple[Tensor, ...]:
        leaves = case.to(torch.float64).leaves()
        rows = by_hand(F.linear(*leaves), teacher, case.labels, **terms)
        loss = rows.sum() / int((case.labels != -100).sum())
        return rows.detach(), *torch.autograd.grad(loss, leaves)

    hidden, weight, bias = case.leaves()
    arguments = (hidden, weight, teacher, case.labels)
    options = {**terms, "student_bias": bias, "label_smoothing": 0.1, "impl": impl}
    rows = linear_kd_loss(*arguments, reduction="none", **options)
    gradients = torch.autograd.grad(linear_kd_loss(*arguments, **options), (hidden, weight, bias))
    for name, ours, truth in zip(
        ("rows", "hidden", "weight", "bias"), (rows, *gradients), truths(eager), strict=True
    ):
        assert_within_budget(ours, truth, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_student_logits_are_not_touched(dtype, tail: Tail, impl: Impl) -> None:
    student = (torch.randn(5, 40, device=DEVICE) * 3).to(dtype).requires_grad_()
    teacher = top_k(torch.randn(5, 40, device=DEVICE), tail)
    labels = torch.randint(0, 40, (5,), device=DEVICE)
    labels[1], labels[3] = teacher.indices[1, 0], -100
    kept = student.detach().clone()
    options = {
        "divergence": JSD(0.4),
        "temperature": 2.0,
        "ce_weight": 0.5,
        "softcap": 5.0,
        "logit_scale": 0.8,
    }
    loss = kd_loss(student, teacher, labels, impl=impl, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(student, kept)

    def eager() -> tuple[Tensor, Tensor]:
        leaf = kept.double().requires_grad_()
        capped = torch.tanh(leaf * 0.8 / 5.0) * 5.0
        log_s, log_t = distributions(capped, teacher, 2.0)
        rows = 4.0 * eager_divergence(log_s, log_t, JSD(0.4))
        rows = rows + 0.5 * F.cross_entropy(capped, labels, reduction="none")
        loss = rows[labels != -100].mean()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    true_loss, true_gradient = truths(eager)
    assert_within_budget(loss, true_loss, "mean")
    assert_within_budget(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3), TVD()], ids=repr)
def test_everything_kept_is_the_whole_teacher(divergence, impl: Impl) -> None:
    student, logits = torch.randn(2, 4, 9, device=DEVICE)
    whole = kd_loss(student, logits, divergence=divergence, temperature=2.0, impl=impl)
    for tail in ("renormalize", "bucket"):
        teacher = top_k(logits, tail, 9)
        loss = kd_loss(student, teacher, divergence=divergence, temperature=2.0, impl=impl)
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_left_where_every_id_was_kept(temperature: float, impl: Impl) -> None:
    """Rounded log-probabilities add up to a little less than 1: that is not another category."""
    torch.manual_seed(0)
    student = torch.randn(64, 3, device=DEVICE, requires_grad=True)
    logits = 3.0 * torch.randn(64, 3, device=DEVICE)
    teacher = top_k(logits, "bucket", 3)
    assert (teacher.logprobs.double().exp().sum(1) < 1.0).any()
    loss = kd_loss(student, teacher, temperature=temperature, impl=impl)
    expected = kd_loss(student, logits, temperature=temperature, impl=impl)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", BUCKETED)
def test_a_certain_teacher_leaves_a_bucket(divergence: Divergence, impl: Impl) -> None:
    """Sums of float32 log-probabilities round to 1 in some rows and not in others: reverse KL would be infinite there."""
    torch.manual_seed(0)
    student = torch.randn(64, 40, device=DEVICE, requires_grad=True)
    teacher = top_k(12.0 * torch.randn(64, 40, device=DEVICE), "bucket")
    rest = 1.0 - teacher.logprobs.double().exp().sum(1)
    assert (rest <= 0.0).any() and ((rest > 0.0) & (rest < MIN_BUCKET_PROB)).any()
    kept = student.log_softmax(-1)
    log_s = kept.gather(1, teacher.indices)
    log_s = torch.cat((log_s, kept.scatter(1, teacher.indices, -math.inf).logsumexp(1, keepdim=True)), 1)
    log_t = torch.cat((teacher.logprobs, rest.clamp_min(2.0**-24).log().float().unsqueeze(1)), 1)
    expected = eager_divergence(log_s, log_t.log_softmax(1), divergence).mean()
    loss = kd_loss(student, teacher, divergence=divergence, impl=impl)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_entries_that_were_not_kept(tail: Tail, impl: Impl) -> None:
    """Rows keep different numbers of entries: the others are -inf, and their ids mean nothing."""
    student = torch.randn(4, 30, device=DEVICE, requires_grad=True)
    short = top_k(torch.randn(4, 30, device=DEVICE), tail, 4)
    free = torch.stack(
        [torch.tensor([i for i in range(30) if i not in row][:2]) for row in short.indices.tolist()]
    )
    padded = TeacherTopK(
        torch.cat((short.logprobs, torch.full((4, 2), -math.inf, device=DEVICE)), 1),
        torch.cat((short.indices, free.to(DEVICE)), 1),
        tail,
    )
    labels = padded.indices[:, 4].clone()
    options = {"divergence": JSD(), "temperature": 2.0, "ce_weight": 0.5, "impl": impl}
    results = []
    for teacher in (short, padded):
        loss = kd_loss(student, teacher, labels, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tail_that_is_nearly_nothing(impl: Impl) -> None:
    """The student's rest is 1e-12 of its mass and the teacher's 1e-3: the gradient goes to the rest with all its digits."""
    student = torch.randn(3, 50, device=DEVICE)
    logits = torch.randn(3, 50, device=DEVICE)
    student[:, :4] += 30.0
    logits[:, :4] += 10.0
    teacher = top_k(logits, "bucket", 4)
    exact_leaf = student.double().requires_grad_()
    exact = eager_divergence(*distributions(exact_leaf, teacher, 1.0), ForwardKL())
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_leaf)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    torch.testing.assert_close(rows.double(), exact.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-8)


# Both ways in which a row does not count; ids that padding holds: the same one, none, none that the vocabulary has.
@pytest.mark.parametrize("by_label", [True, False])
@pytest.mark.parametrize("padding", [0, -1, 99])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_do_not_count_hold_any_entries(padding: int, by_label: bool, impl: Impl) -> None:
    student = torch.randn(3, 9, device=DEVICE, requires_grad=True)
    teacher = top_k(torch.randn(3, 9, device=DEVICE), "bucket", 4)
    labels = torch.tensor([1, -100 if by_label else 2, 3], device=DEVICE)
    weight = None if by_label else torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    logprobs, indices = teacher.logprobs.clone(), teacher.indices.clone()
    logprobs[1], indices[1] = 7.0, padding
    found = []
    for given in (teacher, TeacherTopK(logprobs, indices, "bucket")):
        loss = kd_loss(student, given, labels, token_weight=weight, ce_weight=0.5, impl=impl)
        found.append((loss, *torch.autograd.grad(loss, student)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not found[1][1][1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [ReverseKL(), AlphaBeta(-0.5, 0.5)], ids=repr)
def test_rows_that_do_not_count_stop_infinite_derivatives(divergence: Divergence, impl: Impl) -> None:
    """Of what stands in for such a row these divergences are infinite, and 0 times that is NaN."""
    hidden = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 5, device=DEVICE, requires_grad=True)
    teacher = top_k(torch.randn(3, 9, device=DEVICE), "bucket", 4)
    labels = torch.tensor([1, -100, 3], device=DEVICE)
    options: dict[str, Any] = {
        "divergence": divergence,
        "static_shapes": True,
        "reduction": "sum",
        "impl": impl,
    }
    alive = labels != -100
    some = TeacherTopK(teacher.logprobs[alive], teacher.indices[alive], "bucket")
    loss = linear_kd_loss(hidden, weight, teacher, labels, **options)
    expected = linear_kd_loss(hidden[alive], weight, some, **options)
    torch.testing.assert_close(loss, expected)
    for ours, exact in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


# With and without a gradient: a graph is made, and its node run, differently.
@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_in_a_compiled_graph(tail: Tail, differentiated: bool) -> None:
    student = torch.randn(3, 9, device=DEVICE, requires_grad=differentiated)
    teacher = top_k(torch.randn(3, 9, device=DEVICE), tail, 4)
    compiled = torch.compile(lambda logits: kd_loss(logits, teacher), backend="aot_eager")
    loss, expected = compiled(student), kd_loss(student, teacher)
    assert torch.equal(loss, expected)
    if differentiated:
        assert torch.equal(torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0])
