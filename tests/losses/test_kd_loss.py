"""`kd_loss` on materialised logits, from two classes to a vocabulary, against fp64."""

import pytest
import torch
from torch import Tensor

from kdkernels import JSD, ForwardKL, ReverseKL, TeacherHead, TeacherLogits, kd_loss
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, DIVERGENCES, FAST_IMPLS, IMPLS, eager_row_losses, make_case
from tests.support.rounding import truths


def logits(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and labels with one row in three ignored."""
    student, teacher = (torch.randn(2, rows, classes) * 3).to(DEVICE, dtype)
    labels = torch.randint(0, classes, (rows,), device=DEVICE)
    labels[::3] = -100
    return student, teacher, labels


def eager(student: Tensor, teacher: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Row losses and the gradient of their mean over counted rows."""
    student = student.detach().requires_grad_()
    rows = eager_row_losses(student, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(rows.sum() / int((labels != -100).sum()), student)
    return rows.detach(), gradient


@pytest.mark.parametrize("impl", IMPLS)
# Classification (2, 3, 20 classes) and a vocabulary of several tiles with a ragged end.
@pytest.mark.parametrize("classes", [2, 3, 20, 517])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(0.3)], ids=repr)
@pytest.mark.interpreted(5)
def test_values_and_gradient(divergence, dtype, classes, impl: Impl) -> None:
    student, teacher, labels = logits(10, classes, dtype)
    options = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.7}
    wide = student.double(), teacher.double()
    truth = truths(lambda: eager(*wide, labels, **options))
    student.requires_grad_()
    rows = kd_loss(student, teacher, labels, impl=impl, reduction="none", **options)
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, labels, impl=impl, **options), student)
    assert rows.dtype == torch.float32 and gradient.dtype == dtype
    assert_within_budget(rows, truth[0], "rows")
    assert_within_budget(gradient, truth[1], "gradient")


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_teacher_head_is_projected_chunk_by_chunk(divergence, impl: Impl, monkeypatch) -> None:
    case = make_case()
    if impl == "torch":
        monkeypatch.setattr("kdkernels._torch.sizes.CHUNK_ROWS", 4)
        monkeypatch.setattr("kdkernels._torch.sizes.BLOCK_ELEMENTS", 2 * 67)
    student = case.student_logits.requires_grad_()
    results = []
    for teacher in (case.teacher, TeacherLogits(case.teacher_logits)):
        loss = kd_loss(student, teacher, case.labels, divergence=divergence, ce_weight=0.5, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_axes_and_strides_do_not_matter(impl: Impl) -> None:
    student, teacher, labels = logits(12, 35, torch.float32)
    flat = kd_loss(student, teacher, labels, reduction="none", impl=impl)
    swapped = [
        tensor.reshape(3, 4, *tensor.shape[1:]).transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in (student, teacher, labels)
    ]
    leaf = swapped[0].requires_grad_()
    rows = kd_loss(leaf, swapped[1], swapped[2], reduction="none", impl=impl)
    torch.testing.assert_close(rows.reshape(-1), flat)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(kd_loss(student, teacher, labels, reduction="sum", impl=impl), student)
    torch.testing.assert_close(gradient.reshape(12, 35), expected)
    # A slice of wider rows, and columns strided.
    wide = torch.zeros(12, 50, device=DEVICE)
    wide[:, :35] = student.detach()
    sliced = kd_loss(wide[:, :35], teacher.t().contiguous().t(), labels, reduction="none", impl=impl)
    torch.testing.assert_close(sliced, flat)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_autocast_changes_nothing_for_logits(impl: Impl) -> None:
    case = make_case()
    plain = kd_loss(case.student_logits, case.teacher_logits, case.labels, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = kd_loss(case.student_logits.float(), case.teacher_logits.float(), case.labels, impl=impl)
        headed = kd_loss(case.student_logits.float(), case.teacher, case.labels, impl=impl)
    assert loss.dtype == headed.dtype == torch.float32
    assert abs(loss.item() - plain.item()) < 0.05 * plain.item()
    half = TeacherHead(case.teacher_hidden.bfloat16(), case.teacher_weight.bfloat16(), case.teacher_bias)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        student = case.student_logits
    torch.testing.assert_close(kd_loss(student, half, case.labels, impl=impl), headed, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float64], ids=str)
def test_the_student_sets_the_dtype(teacher_dtype: torch.dtype, impl: Impl) -> None:
    student, teacher, labels = logits(4, 7, torch.float64)
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        loss, stats = kd_loss(
            student.to(dtype), teacher.to(teacher_dtype), labels, impl=impl, return_stats=True
        )
        assert {loss.dtype, *(number.dtype for number in stats)} == {expected}
