"""The short way of `kd_loss` for few logits on a CPU: which calls take it, that they are right, and that nothing else changes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import JSD, TVD, Decoupled, ForwardKL, KDLoss, ReverseKL, TeacherLogits, kd_loss
from kdkernels.logits.few_rows import SMALL_LOGITS
from tests.support.budget import assert_within_budget
from tests.support.inputs import eager_row_losses
from tests.support.refusals import refused
from tests.support.rounding import truths

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="few logits on a GPU go the general way")
SHORT = [ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.2)]


def inputs(
    rows: int = 8, classes: int = 20, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (3.0 * torch.randn(2, rows, classes)).to(dtype)
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def is_short(loss: Tensor) -> bool:
    assert loss.grad_fn is not None
    return loss.grad_fn.name() == "GradientKeptBackward"


def both(
    student: Tensor, teacher: Any, labels: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient, and the loss with its graph."""
    loss = kd_loss(student, teacher, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, student, retain_graph=True)[0], loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.5), (4.0, 0.0), (4.0, 0.5)])
@pytest.mark.parametrize("classes", [2, 3, 20, 517])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", SHORT, ids=repr)
def test_values_and_gradient(divergence, dtype, classes, temperature, ce_weight, reduction) -> None:
    student, teacher, labels = inputs(10, classes, dtype)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight, "kd_weight": 0.7}
    loss, gradient, graph = both(student, teacher, labels, reduction=reduction, **options)
    assert is_short(graph) and loss.dtype == dtype and gradient.dtype == dtype

    def by_hand() -> tuple[Tensor, Tensor]:
        leaf = student.detach().double().requires_grad_()
        rows = eager_row_losses(leaf, teacher.double(), labels, **options)
        total = rows.sum() if reduction == "sum" else rows.mean()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    if dtype == torch.float64:
        exact, exact_gradient = by_hand()
        torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, exact_gradient, rtol=1e-12, atol=1e-13)
        return
    truth = truths(by_hand)
    assert_within_budget(loss, truth[0], "loss")
    assert_within_budget(gradient, truth[1], "gradient")


# A student at its teacher, logits far from 0, and peaked rows, whose exponentials leave the range of float32.
@pytest.mark.parametrize(
    ("scale", "shift", "near"), [(3.0, 0.0, 0.99), (3.0, 0.0, 1.0), (3.0, 9e3, 0.5), (40.0, 0.0, 0.5)]
)
@pytest.mark.parametrize("divergence", [*SHORT, TVD()], ids=repr)
def test_hard_rows(divergence, scale, shift, near) -> None:
    teacher = scale * torch.randn(6, 31)
    student = (near * teacher + (1.0 - near) * scale * torch.randn(6, 31) + shift).requires_grad_()
    options = {"divergence": divergence, "temperature": 2.0}
    loss, gradient, _ = both(student, teacher, None, **options)

    def by_hand() -> tuple[Tensor, Tensor]:
        leaf = student.detach().double().requires_grad_()
        total = eager_row_losses(leaf, teacher.double(), None, **options).mean()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    truth = truths(by_hand)
    assert_within_budget(loss, truth[0], "loss")
    if near < 1.0 or not isinstance(divergence, TVD):  # whose gradient is a matter of rounding at the teacher
        assert_within_budget(gradient, truth[1], "gradient")


def test_which_calls_take_it() -> None:
    student, teacher, labels = inputs()
    ignored = labels.clone()
    ignored[2] = -100
    assert is_short(kd_loss(student, teacher, labels))
    assert is_short(kd_loss(student, TeacherLogits(teacher), impl="torch", num_items_in_batch=4))
    assert is_short(kd_loss(student, teacher, num_items_in_batch=torch.tensor(4)))
    assert is_short(KDLoss(temperature=2.0, ce_weight=0.5)(student, teacher, labels))
    assert is_short(kd_loss(student.view(2, 4, 20), teacher.view(2, 4, 20), labels.view(2, 4), ce_weight=1.0))
    assert is_short(kd_loss(student, teacher, labels, ignore_index=20))
    weight = torch.ones(8)
    for options in (
        {"divergence": TVD()},
        {"divergence": Decoupled()},
        {"labels": ignored},
        {"labels": labels, "ignore_index": int(labels[0])},
        {"token_weight": weight},
        {"reduction": "none"},
        {"check_finite": True},
        {"label_smoothing": 0.1, "ce_weight": 1.0},
        {"softcap": 5.0},
        {"logit_scale": 0.5},
        {"kd_weight": 0.0},
        {"impl": "reference"},
        {"vocab_map": "shared_prefix"},
    ):
        given = {"labels": labels, **options}
        assert not is_short(kd_loss(student, teacher, **given).sum()), options
    assert not is_short(kd_loss(student, teacher, return_stats=True)[0])
    large = torch.randn(SMALL_LOGITS // 64 + 1, 64, requires_grad=True)
    assert not is_short(kd_loss(large, large.detach()))
    assert not is_short(kd_loss(student, teacher.double()))


@pytest.mark.parametrize("divergence", SHORT, ids=repr)
def test_rows_that_do_not_count_are_left_to_the_general_way(divergence) -> None:
    student, teacher, labels = inputs()
    labels[::3] = -100
    options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 2.0}
    expected = both(student, teacher, labels, **options)
    some = labels != -100
    alone = student.detach()[some].requires_grad_()
    short = both(alone, teacher[some], labels[some], **options)
    assert is_short(short[2]) and not is_short(expected[2])
    torch.testing.assert_close(short[0], expected[0])
    torch.testing.assert_close(short[1], expected[1][some])
    with torch.no_grad():
        student[::3], teacher[::3] = math.nan, math.inf
    dirty = both(student, teacher, labels, **options)
    torch.testing.assert_close(dirty[:2], expected[:2])
    assert not dirty[1][::3].any()


@pytest.mark.parametrize("divergence", SHORT, ids=repr)
def test_infinite_logits_are_left_to_the_general_way(divergence) -> None:
    student, teacher, labels = inputs()
    with torch.no_grad():
        student[:, 3] = teacher[:, 3] = -math.inf  # excluded by both
    labels[labels == 3] = 4
    loss, gradient, graph = both(student, teacher, labels, divergence=divergence, ce_weight=0.5)
    assert not is_short(graph)
    exact = kd_loss(student, teacher, labels, divergence=divergence, ce_weight=0.5, impl="reference")
    torch.testing.assert_close(loss, exact.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, student)[0], rtol=1e-5, atol=1e-7)


def test_the_graph() -> None:
    student, teacher, labels = inputs()
    loss, gradient, graph = both(student, teacher, labels, ce_weight=0.5)
    assert torch.equal(torch.autograd.grad(graph, student, retain_graph=True)[0], gradient)
    (double,) = torch.autograd.grad(2.0 * graph, student, retain_graph=True)
    assert torch.equal(double, 2.0 * gradient)
    (first,) = torch.autograd.grad(graph, student, create_graph=True)
    assert torch.equal(first, gradient)
    with pytest.raises(RuntimeError, match="kdkernels losses have no second derivative"):
        first.sum().backward()
    with torch.no_grad():
        assert torch.equal(kd_loss(student, teacher, labels, ce_weight=0.5), loss)
        graph = kd_loss(student, teacher, labels, ce_weight=0.5)
        assert graph.grad_fn is None
    loss = kd_loss(student, teacher, labels)
    with torch.no_grad():
        student.add_(1.0)  # an optimizer's step: the gradient is there already
    loss.backward()
    assert student.grad is not None


def test_refusals_are_those_of_the_general_way() -> None:
    student, teacher, labels = inputs()
    arguments: dict[str, Any] = {"student_logits": student, "teacher": teacher, "labels": labels}
    wrong = labels.clone()
    wrong[1] = 20
    for sentence, changes in (
        (
            "labels must be in [0, 20) or equal to ignore_index, got 20 (the first of 1 invalid labels); check the "
            "vocabulary and the padding of the labels",
            {"labels": wrong},
        ),
        ("labels must be an int64 tensor of class ids, got torch.float32", {"labels": labels.float()}),
        (
            "labels must have shape (8,) to go with student_logits (8, 20), got (7,)",
            {"labels": labels[1:]},
        ),
        (
            "student_logits and teacher logits must have the same rows, got shapes (8, 20) and (7, 20)",
            {"teacher": teacher[1:]},
        ),
        (
            "ce_weight is 1.0 but there are no labels; pass labels or set ce_weight=0.0",
            {"labels": None, "ce_weight": 1.0},
        ),
        (
            "num_items_in_batch is 0, but 8 row(s) count here; pass the number of counted rows of all micro-batches "
            "together",
            {"num_items_in_batch": 0},
        ),
        (
            "teacher logits requires grad, but the teacher is frozen here and would get no gradient; run the teacher under "
            "torch.no_grad(), or pass the tensor's .detach()",
            {"teacher": teacher.clone().requires_grad_()},
        ),
    ):
        refused(kd_loss, sentence, **{**arguments, **changes})


def test_options_are_checked_once_by_value_and_type() -> None:
    """1 and True are equal, and so are their hashes: an answer for one is none for the other."""
    student, teacher, _ = inputs()
    kd_loss(student, teacher, temperature=1.0, t_squared=True, kd_weight=1)
    for sentence, options in (
        ("temperature must be a plain number, got bool", {"temperature": True}),
        ("kd_weight must be a plain number, got bool", {"kd_weight": True}),
        ("t_squared must be True or False, got 1", {"t_squared": 1}),
        ("temperature must be a plain number, got list", {"temperature": [1.0]}),
    ):
        for _ in range(2):
            refused(kd_loss, sentence, student_logits=student, teacher=teacher, **dict[str, Any](options))
    first, second = (kd_loss(student, teacher, temperature=temperature) for temperature in (2.0, 3.0))
    assert first != second
