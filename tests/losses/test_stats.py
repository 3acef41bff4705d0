"""`return_stats=True`: seven numbers per token that cost no other result a digit."""

import math
from typing import Any

import pytest
import torch

from kdkernels import (
    JSD,
    AlphaBeta,
    Divergence,
    KDStats,
    ReverseKL,
    TeacherHead,
    TeacherLogits,
    kd_loss,
    linear_kd_loss,
)
from kdkernels.options import Impl, LogitTransform, RowTerms
from kdkernels.reference import statistics
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, IMPLS, make_case
from tests.support.rounding import truths

OPTIONS: dict[str, Any] = {"divergence": JSD(0.3), "temperature": 2.0, "ce_weight": 0.5}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numbers(reduction, impl: Impl) -> None:
    case = make_case()
    counted = case.labels != -100
    hidden, weight, bias = case.leaves()
    arguments = (hidden, weight, case.teacher, case.labels)
    options: dict[str, Any] = {**OPTIONS, "student_bias": bias, "impl": impl, "reduction": reduction}
    loss, stats = linear_kd_loss(*arguments, return_stats=True, **options)
    assert isinstance(stats, KDStats)
    plain = linear_kd_loss(*arguments, **options)
    assert torch.equal(loss, plain)
    leaves = (hidden, weight, bias)
    for ours, other in zip(
        torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True
    ):
        assert torch.equal(ours, other)
    for name, numbers in stats._asdict().items():
        assert numbers.shape == (13,) and numbers.dtype == torch.float32 and not numbers.requires_grad, name
        assert torch.equal(numbers[~counted], torch.zeros_like(numbers[~counted])), name

    p_s, p_t = case.student_logits.double().softmax(-1), case.teacher_logits.double().softmax(-1)
    label = case.labels.clamp_min(0).unsqueeze(1)
    expected = {
        "student_entropy": -(p_s * p_s.log()).sum(-1),
        "teacher_entropy": -(p_t * p_t.log()).sum(-1),
        "teacher_target_prob": p_t.gather(1, label).squeeze(1),
        "student_target_prob": p_s.gather(1, label).squeeze(1),
        "agrees": (p_s.argmax(-1) == p_t.argmax(-1)).double(),
    }
    for name, exact in expected.items():
        torch.testing.assert_close(
            getattr(stats, name)[counted].double(), exact[counted], rtol=1e-5, atol=1e-6
        )
    options["reduction"] = "none"
    rows = linear_kd_loss(*arguments, **options)
    torch.testing.assert_close(4.0 * stats.kd + 0.5 * stats.ce, rows)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_and_no_labels(impl: Impl) -> None:
    student, teacher = torch.randn(2, 3, 4, 20, device=DEVICE)
    loss, stats = kd_loss(student, teacher, return_stats=True, impl=impl)
    assert loss.dim() == 0
    assert all(numbers.shape == (3, 4) for numbers in stats)
    assert stats.teacher_target_prob.isnan().all() and stats.student_target_prob.isnan().all()
    assert stats.kd.isfinite().all() and torch.equal(stats.ce, torch.zeros_like(stats.ce))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["shared_prefix", "index"])
def test_each_over_its_own_vocabulary(kind, impl: Impl) -> None:
    """Entropies and probabilities are the models' own; ids are compared as tokens."""
    student, teacher = torch.randn(6, 12, device=DEVICE), torch.randn(6, 15, device=DEVICE)
    labels = torch.tensor([0, 1, 2, 3, 11, 5], device=DEVICE)
    vocab_map = kind
    its = torch.arange(12, device=DEVICE)
    if kind == "index":
        its = torch.tensor([14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, -1], device=DEVICE)
        vocab_map = its
    teacher[0, int(its[student[0].argmax()])] = 9.0
    _, stats = kd_loss(student, teacher, labels, vocab_map=vocab_map, return_stats=True, impl=impl)
    p_t = teacher.softmax(-1)
    torch.testing.assert_close(stats.teacher_entropy, -(p_t * p_t.log()).sum(-1))
    expected = p_t.gather(1, its[labels].clamp_min(0).unsqueeze(1)).squeeze(1)
    expected[its[labels] < 0] = float("nan")
    torch.testing.assert_close(stats.teacher_target_prob, expected, equal_nan=True)
    assert stats.agrees[0] == 1.0
    torch.testing.assert_close(stats.agrees, (its[student.argmax(-1)] == teacher.argmax(-1)).float())


# None, a prefix with teacher columns after it, one with student columns after it, an index map; several blocks of rows.
@pytest.mark.parametrize("mapping", ["none", "more of the teacher's", "more of the student's", "index"])
def test_digits(mapping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function behind all back ends, from float32 logits, against its truth in float64; ignored rows hold NaN."""
    monkeypatch.setattr(statistics, "ELEMENTS", 400)
    places = torch.randperm(130)[:90]
    index = torch.full((130,), -1).scatter(0, places, torch.arange(90))
    sizes: dict[str, tuple[int, int, Any]] = {
        "none": (130, 130, None),
        "more of the teacher's": (128, 210, 128),
        "more of the student's": (210, 70, 70),
        "index": (130, 90, index),
    }
    student_size, teacher_size, vocab_map = sizes[mapping]
    student, teacher = 4.0 * torch.randn(7, student_size), 4.0 * torch.randn(7, teacher_size)
    student[1, 20:30] = -math.inf
    student[4], teacher[4] = math.nan, math.nan
    labels = torch.tensor([0, student_size - 1, 5, 69, -100, 31, student_size])
    weight = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0, -1.0, 1.0])
    terms = RowTerms(
        student_transform=LogitTransform(1.5), teacher_transform=LogitTransform(1.0, 40.0), temperature=2.0
    )
    bias = torch.randn(student_size)
    options: dict[str, Any] = {"student_bias": bias, "vocab_map": vocab_map}
    ours = statistics.row_statistics(student, teacher, labels, weight, terms, **options)
    wide = student.double(), teacher.double()
    (truth,) = truths(lambda: (statistics.row_statistics(*wide, labels, weight, terms, **options),))
    assert ours.dtype == torch.float32 and truth.value.dtype == torch.float64
    assert torch.equal(ours[:, 4], torch.zeros(5))
    assert ours[3, 6].isnan() and ours[2, 6].isnan()  # no id of the student
    assert torch.equal(ours[2].isnan(), truth.value[2].isnan())
    for row, title in enumerate(("student entropy", "teacher entropy", "teacher label", "student label")):
        known = ~truth.value[row].isnan()
        assert_within_budget(ours[row][known], truth[row][known], title)
    assert torch.equal(ours[4].double(), truth.value[4])


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_first_column(impl: Impl) -> None:
    student, teacher = torch.randn(2, 3, 200, device=DEVICE)
    for row, (first, second) in enumerate([(3, 5), (17, 60), (40, 170)]):
        student[row, first] = student[row, second] = 50.0
        teacher[row, first] = 50.0
    _, stats = kd_loss(student, teacher, return_stats=True, impl=impl)
    assert stats.agrees.eq(1.0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_and_softcap(impl: Impl) -> None:
    student, teacher = torch.randn(2, 4, 9, device=DEVICE)
    student[:, 3] = teacher[:, 3] = -torch.inf
    _, stats = kd_loss(student, teacher, return_stats=True, impl=impl)
    for numbers in (stats.student_entropy, stats.teacher_entropy, stats.agrees):
        assert numbers.isfinite().all()
    hidden, weight = torch.randn(4, 5, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    head = TeacherHead(hidden, weight, softcap=1.5)
    _, stats = kd_loss(student, head, return_stats=True, impl=impl)
    p_t = (torch.tanh(hidden @ weight.t() / 1.5) * 1.5).softmax(-1)
    torch.testing.assert_close(stats.teacher_entropy, -(p_t * p_t.log()).sum(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [ReverseKL(), AlphaBeta(-0.5, -0.2)])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_divergence_that_only_is_a_statistic(divergence: Divergence, ce_weight: float, impl: Impl) -> None:
    """With kd_weight 0 it may be infinite: loss and gradients are those without statistics, the logits stay as they are."""
    case = make_case()
    leaves = case.leaves()
    hidden, weight, bias = leaves
    student_logits = hidden @ weight.t() + bias
    before = student_logits.detach().clone()
    teacher_logits = case.teacher_logits.clone()
    teacher_logits[:, 1] = -math.inf
    found = []
    for return_stats in (True, False):
        for loss in (
            kd_loss(
                student_logits, teacher_logits, case.labels, divergence=divergence, kd_weight=0.0,
                ce_weight=ce_weight, softcap=9.0, impl=impl, return_stats=return_stats,
            ),
            linear_kd_loss(
                hidden, weight, TeacherLogits(teacher_logits), case.labels, student_bias=bias, divergence=divergence,
                kd_weight=0.0, ce_weight=ce_weight, softcap=9.0, impl=impl, return_stats=return_stats,
            ),
        ):  # fmt: skip
            value = loss[0] if isinstance(loss, tuple) else loss
            found.append((value, *torch.autograd.grad(value, leaves, retain_graph=True)))
            if isinstance(loss, tuple):
                assert not loss[1].kd[case.labels != -100].isfinite().any()
    for with_stats, plain in zip(found[:2], found[2:], strict=True):
        for ours, other in zip(with_stats, plain, strict=True):
            assert other.isfinite().all()
            torch.testing.assert_close(ours, other)
    assert torch.equal(student_logits, before)
