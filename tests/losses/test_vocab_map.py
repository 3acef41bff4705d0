"""Students and teachers with different vocabularies: both softmaxes over the shared ids, gradient zero elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from kdkernels import JSD, Decoupled, ForwardKL, TeacherHead, TeacherLogits, kd_loss, linear_kd_loss
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, IMPLS, eager_row_losses, make_case
from tests.support.rounding import truths


def permutation(student_vocabulary: int, teacher_vocabulary: int) -> Tensor:
    """Two ids in three shared, in an order of their own."""
    mapping = torch.randperm(teacher_vocabulary, device=DEVICE)[:student_vocabulary]
    mapping = torch.cat((mapping, mapping.new_full((student_vocabulary - len(mapping),), -1)))
    mapping[::3] = -1
    return mapping


def cut(student: Tensor, teacher: Tensor, vocab_map: str | Tensor) -> tuple[Tensor, Tensor]:
    """The shared columns of both sides, by hand."""
    if isinstance(vocab_map, str):
        shared = min(student.shape[1], teacher.shape[1])
        return student[:, :shared], teacher[:, :shared]
    pairs = [(mine, its) for mine, its in enumerate(vocab_map.tolist()) if its >= 0]
    return student[:, [mine for mine, _ in pairs]], teacher[:, [its for _, its in pairs]]


@pytest.mark.parametrize("impl", IMPLS)
# The student has more ids, or the teacher has.
@pytest.mark.parametrize(("student_vocabulary", "teacher_vocabulary"), [(67, 50), (50, 67)])
@pytest.mark.parametrize("kind", ["shared_prefix", "index"])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.6), (2.0, 0.6)])
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3)], ids=repr)
@pytest.mark.interpreted(5)
def test_the_divergence_runs_over_the_shared_ids(
    divergence, temperature, ce_weight, kind, student_vocabulary, teacher_vocabulary, impl: Impl
) -> None:
    case = make_case(vocabulary=student_vocabulary)
    teacher_weight, teacher_bias = torch.randn(teacher_vocabulary, 12), torch.randn(teacher_vocabulary)
    teacher = TeacherHead(case.teacher_hidden, teacher_weight.to(DEVICE), teacher_bias.to(DEVICE))
    vocab_map = kind if kind == "shared_prefix" else permutation(student_vocabulary, teacher_vocabulary)
    options = {"divergence": divergence, "temperature": temperature}

    def by_hand() -> tuple[Tensor, ...]:
        hidden, weight, bias = case.to(torch.float64).leaves()
        logits = torch.nn.functional.linear(hidden, weight, bias)
        its = torch.nn.functional.linear(*(tensor.double() for tensor in (teacher.hidden, teacher.weight)))
        its = its + teacher_bias.to(its)
        rows = eager_row_losses(*cut(logits, its, vocab_map), None, **options)
        rows = rows + ce_weight * torch.nn.functional.cross_entropy(logits, case.labels, reduction="none")
        loss = rows[case.labels != -100].mean()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))

    hidden, weight, bias = case.leaves()
    loss = linear_kd_loss(
        hidden, weight, teacher, case.labels, student_bias=bias, vocab_map=vocab_map, ce_weight=ce_weight,
        impl=impl, **options,
    )  # fmt: skip
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight, bias)))
    for one, exact in zip(ours, truths(by_hand), strict=True):
        assert_within_budget(one, exact, "loss or gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["shared_prefix", "index"])
def test_the_gradient_is_zero_where_nothing_is_shared(kind, impl: Impl) -> None:
    student = torch.randn(4, 60, device=DEVICE)
    student[:, 59] = 500.0  # overwhelms every shared id, and takes no part
    teacher = torch.randn(4, 50, device=DEVICE)
    vocab_map = kind if kind == "shared_prefix" else permutation(60, 50)
    student.requires_grad_()
    loss = kd_loss(student, teacher, vocab_map=vocab_map, impl=impl)
    (gradient,) = torch.autograd.grad(loss, student)
    alone = cut(student.detach(), teacher, vocab_map)
    torch.testing.assert_close(loss, kd_loss(*alone, impl=impl))
    unshared = torch.ones(60, dtype=torch.bool)
    unshared[: 50 if kind == "shared_prefix" else 0] = False
    if isinstance(vocab_map, Tensor):
        unshared = vocab_map < 0
    assert torch.equal(gradient[:, unshared], torch.zeros_like(gradient[:, unshared]))
    assert gradient[:, ~unshared].abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_qwen_coder(impl: Impl) -> None:
    """Qwen2.5-Coder: 151936 logits in the small models, 152064 in the large ones, the same tokens."""
    student = torch.randn(1, 151936, device=DEVICE, requires_grad=True)
    teacher = torch.randn(1, 152064, device=DEVICE)
    loss = kd_loss(student, teacher, vocab_map="shared_prefix", impl=impl)
    exact = eager_row_losses(
        student.detach().double(), teacher[:, :151936].double(), None, divergence=ForwardKL()
    )
    torch.testing.assert_close(loss.double(), exact.mean(), rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss, student)
    exact_gradient = student.detach().double().softmax(-1) - teacher[:, :151936].double().softmax(-1)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["shared_prefix", "index"])
def test_decoupled_with_a_label_that_is_not_shared(kind, impl: Impl) -> None:
    """Such a label has probability 0 on both sides: nothing is split off, and the others are all shared ids."""
    student, teacher = torch.randn(3, 30, device=DEVICE), torch.randn(3, 20, device=DEVICE)
    vocab_map: str | Tensor = kind
    if kind == "index":
        vocab_map = torch.cat((torch.arange(20).flip(0), torch.full((10,), -1))).to(DEVICE)
    labels = torch.tensor([3, 27, 4], device=DEVICE)
    rows = kd_loss(
        student,
        teacher,
        labels,
        divergence=Decoupled(2.0, 3.0),
        vocab_map=vocab_map,
        reduction="none",
        impl=impl,
    )
    whole = kd_loss(*cut(student, teacher, vocab_map), reduction="none", impl=impl)
    torch.testing.assert_close(rows[1], 3.0 * whole[1])
    assert (rows - 3.0 * whole)[[0, 2]].abs().min() > 1e-3


def test_refusals() -> None:
    student, teacher = torch.randn(3, 8, device=DEVICE), torch.randn(3, 6, device=DEVICE)
    good = torch.tensor([0, 1, 2, -1, -1, 3, 4, 5], device=DEVICE)
    for vocab_map, sentence in (
        ("prefix", "vocab_map must be None, 'shared_prefix' or an index tensor, got 'prefix'"),
        (good.float(), "vocab_map must be an int64 tensor of teacher ids, got torch.float32"),
        (
            good[:5],
            "vocab_map must have shape (8,), one teacher id or -1 for each student id, got (5,)",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            kd_loss(student, teacher, vocab_map=vocab_map)
        assert str(caught.value) == sentence
    if DEVICE == "cpu":  # on a GPU looking would make the host wait
        for place, value, sentence in (
            (0, 6, "vocab_map must hold teacher ids in [0, 6) or -1, got 6"),
            (0, -2, "vocab_map must hold teacher ids in [0, 6) or -1, got -2"),
            (0, 5, "vocab_map names teacher id 5 more than once; each may stand for one student id"),
        ):
            bad = good.clone()
            bad[place] = value
            with pytest.raises(ValueError) as caught:
                kd_loss(student, TeacherLogits(teacher), vocab_map=bad)
            assert str(caught.value) == sentence
        with pytest.raises(ValueError, match="vocab_map shares no id"):
            kd_loss(student, teacher, vocab_map=torch.full((8,), -1))
    assert math.isfinite(kd_loss(student, teacher, vocab_map=good, impl="reference").item())
