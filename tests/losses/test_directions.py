"""`projection_mse(normalize=True)`, `cosine_loss` and several layer pairs, against eager PyTorch."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import cosine_loss, projection_mse
from kdkernels.options import Impl, Project
from tests.losses.test_projection_mse import Inputs, make_inputs
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS
from tests.support.rounding import truths

Loss = str  # "normalized" or "cosine"
LOSSES: list[Loss] = ["normalized", "cosine"]


def ours(loss: Loss, *tensors: Any, **options: Any) -> Tensor:
    """The loss by its name here."""
    if loss == "cosine":
        return cosine_loss(*tensors, **options)
    return projection_mse(*tensors, normalize=True, **options)


def eager(inputs: Inputs, loss: Loss, project: Project, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The eager lines of the docstrings in float64, and their gradients for student, weight and bias."""
    student, teacher, weight, bias = (
        None if tensor is None else tensor.detach().double().requires_grad_(index != 1)
        for index, tensor in enumerate(inputs)
    )
    assert student is not None and teacher is not None
    source, target = (student, teacher) if project == "student" else (teacher, student)
    projected = source if weight is None else F.linear(source, weight, bias)
    if mask is not None:
        projected, target = projected[mask], target[mask]
    if loss == "cosine":
        value = (1.0 - F.cosine_similarity(projected, target, dim=-1)).mean()
    else:
        value = F.mse_loss(F.normalize(projected, dim=-1), F.normalize(target, dim=-1))
    leaves = [leaf for leaf in (student, weight, bias) if leaf is not None]
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
# The mapped side gets its gradient through the projection, the other one directly; both need one with "teacher".
@pytest.mark.parametrize(("project", "projected"), [("student", True), ("teacher", True), ("student", False)])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_eager_lines(
    loss: Loss, project: Project, projected: bool, masked: bool, dtype: torch.dtype, impl: Impl
) -> None:
    # Wide enough for root mean squares to mean something: a bias has one gradient per column.
    inputs = make_inputs(project, dtype, projected=projected, widths=(24, 40))
    mask = torch.arange(11, device=DEVICE) % 3 != 0 if masked else None
    truth = truths(lambda: eager(inputs, loss, project, mask))
    leaves = [tensor.requires_grad_() for tensor in (inputs[0], *inputs[2:]) if tensor is not None]
    value = ours(loss, *inputs, project=project, mask=mask, impl=impl)
    assert value.dtype == torch.float32
    assert_within_budget(value, truth[0], "loss")
    for index, gradient in enumerate(torch.autograd.grad(value, leaves)):
        assert gradient.dtype == dtype
        assert_within_budget(gradient, truth[1 + index], f"gradient {index}")


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_keeps_its_digits_where_the_sides_agree(loss: Loss, impl: Impl) -> None:
    """The value is far better than eager's 1 - cosine; the gradient is held to the budget."""
    teacher = torch.randn(16, 64, device=DEVICE)
    student = 3.0 * teacher + 1e-3 * torch.randn_like(teacher)
    inputs: Inputs = (student, teacher, None, None)
    truth = truths(lambda: eager(inputs, loss, "student", None))
    leaf = student.requires_grad_()
    value = ours(loss, leaf, teacher, impl=impl)
    assert abs(value.item() / truth[0].value.item() - 1.0) < 1e-4
    (gradient,) = torch.autograd.grad(value, leaf)
    assert_within_budget(gradient, truth[1], "gradient")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_zero_vector_has_no_direction(impl: Impl) -> None:
    student, teacher = torch.randn(4, 5, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    student[1] = student[3] = teacher[2] = teacher[3] = 0.0
    student.requires_grad_()
    for loss, lone, both in (("cosine", 1.0, 1.0), ("normalized", 1.0, 0.0)):
        values = ours(loss, student, teacher, reduction="none", impl=impl)
        torch.testing.assert_close(values[1:], torch.tensor([lone, lone, both], device=DEVICE))
        (gradient,) = torch.autograd.grad(values.sum(), student)
        if impl == "reference":  # of a teacher without a direction: what autograd's rounding leaves
            torch.testing.assert_close(gradient[2], torch.zeros_like(gradient[2]), rtol=0, atol=1e-6)
            gradient[2] = 0.0
        assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))
        assert gradient[0].abs().max() > 0
    assert torch.equal(
        F.cosine_similarity(student, teacher)[1:].detach(), torch.zeros(3, device=DEVICE)
    )  # as eager says


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_lengths_too_small_and_too_large(loss: Loss, impl: Impl) -> None:
    """A feature shorter than 1e-12 is none; one whose square leaves float32 is a NaN, not a quiet nonsense."""
    student, teacher = torch.randn(2, 3, 5, device=DEVICE)
    expected = ours(loss, student, teacher, reduction="none", impl=impl)
    zero = ours(loss, 0.0 * student, teacher, reduction="none", impl=impl)
    for scale, values in ((1e-14, zero), (1e-10, expected), (1e17, expected), (1e25, torch.nan * expected)):
        for sides in ((scale * student, teacher), (student, scale * teacher)):
            found = ours(loss, *sides, reduction="none", impl=impl)
            torch.testing.assert_close(found, values, equal_nan=True)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projected", [False, True])
def test_the_students_dtype_says_how_many_digits(
    projected: bool, student_dtype: torch.dtype, teacher_dtype: torch.dtype, impl: Impl
) -> None:
    inputs = make_inputs("teacher", torch.float64, projected=projected)
    student, teacher = inputs[0].to(student_dtype), inputs[1].to(teacher_dtype)
    weight, bias = (None if side is None else side.to(teacher_dtype) for side in inputs[2:])
    sides = (student, teacher, weight, bias)
    exact: list[Any] = [None if side is None else side.double() for side in sides]
    for loss in ("squared", *LOSSES):
        leaf = student.clone().requires_grad_()
        compare = projection_mse if loss == "squared" else partial(ours, loss)
        value = compare(leaf, teacher, weight, bias, project="teacher", impl=impl)
        expected = compare(*exact, project="teacher", impl="reference")
        assert value.dtype == (torch.float64 if student_dtype == torch.float64 else torch.float32)
        assert torch.autograd.grad(value, leaf)[0].dtype == student_dtype
        tolerance = 1e-12 if student_dtype == torch.float64 else 1e-5
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("project", ["student", "teacher"])
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_rows_may_hold_anything(loss: Loss, project: Project, impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs(project)
    assert weight is not None
    mask = torch.arange(11, device=DEVICE) % 3 != 0

    def solve() -> tuple[Tensor, ...]:
        leaves = (student.clone().requires_grad_(), weight.clone().requires_grad_())
        value = ours(loss, leaves[0], teacher, leaves[1], bias, project=project, mask=mask, impl=impl)
        return value.detach(), *torch.autograd.grad(value, leaves)

    expected = solve()
    assert torch.equal(expected[1][~mask], torch.zeros_like(expected[1][~mask]))
    for junk in (float("nan"), 1e30):
        student[~mask] = teacher[~mask] = junk
        for one, other in zip(solve(), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss: Loss, impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs("teacher", rows=12)
    mask = (torch.arange(12, device=DEVICE) % 4 != 1).view(3, 4)
    tensors = (student.view(3, 4, 6).requires_grad_(), teacher.view(3, 4, 9), weight, bias)
    options: dict[str, Any] = {"project": "teacher", "mask": mask, "impl": impl}
    rows = ours(loss, *tensors, reduction="none", **options)
    assert rows.shape == (3, 4) and torch.equal(rows == 0, ~mask)
    torch.testing.assert_close(ours(loss, *tensors, reduction="sum", **options), rows.sum())
    divisor = 9 * (1 if loss == "cosine" else 6)
    torch.testing.assert_close(ours(loss, *tensors, **options), rows.sum() / divisor)
    nothing = ours(loss, *tensors, project="teacher", mask=mask & ~mask, impl=impl)
    (gradient,) = torch.autograd.grad(nothing, tensors[0])
    assert nothing == 0.0 and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("project", ["student", "teacher"])
def test_gradcheck(project: Project, loss: Loss, impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs(project, torch.float64, rows=5)
    assert weight is not None and bias is not None
    mask = torch.tensor([True, True, False, True, True], device=DEVICE)
    leaves = (student.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda student, weight, bias, reduction=reduction: ours(
                loss, student, teacher, weight, bias,
                project=project, mask=mask, reduction=reduction, impl=impl,
            ),
            leaves,
        )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_several_layer_pairs(impl: Impl) -> None:
    pairs = [make_inputs("student"), make_inputs("student"), make_inputs("student")]
    students, teachers, weights, biases = (list(column) for column in zip(*pairs, strict=True))
    leaves = [leaf.requires_grad_() for leaf in (*students, *weights) if leaf is not None]
    mask = torch.arange(11, device=DEVICE) % 3 != 0
    for options in ({"reduction": "mean"}, {"reduction": "sum"}, {"reduction": "none", "normalize": True}):
        options = {**options, "mask": mask, "impl": impl}
        single = torch.stack([projection_mse(*pair, **options) for pair in pairs])
        expected = {"mean": single.mean(), "sum": single.sum(), "none": single}[str(options["reduction"])]
        together = projection_mse(students, teachers, weights, biases, **options)
        torch.testing.assert_close(together, expected)
        upstream = torch.rand_like(expected)
        for one, other in zip(
            torch.autograd.grad(together, leaves, upstream),
            torch.autograd.grad(expected, leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    shared = projection_mse(students, teachers, weights[0], biases[0], impl=impl)
    stacked = projection_mse(torch.stack(students), torch.stack(teachers), weights[0], biases[0], impl=impl)
    torch.testing.assert_close(shared, stacked)


def test_bad_layer_pairs() -> None:
    student, teacher, weight, _ = make_inputs("student")
    refusals = [
        (
            ([student, student], teacher, weight),
            "student is a list of 2 layers but teacher is Tensor; pass a list with one teacher layer per student layer",
        ),
        (([], [], weight), "student is an empty list; pass at least one layer pair"),
        (
            ([student, student], [teacher], weight),
            "student has 2 layers but teacher has 1; pass one teacher per student layer",
        ),
        (
            ([student, student], [teacher, teacher], [weight, weight, weight]),
            "student has 2 layers but weight has 3; pass one weight per student layer",
        ),
        (
            ([student, student], [teacher, teacher[:3]], weight),
            "layer pair 2 of 2: student and teacher must have the same rows, got shapes (11, 6) and (3, 9)",
        ),
        (
            (student, [teacher], weight),
            "teacher must be a tensor, got list",
        ),
    ]
    for loss in (projection_mse, cosine_loss):
        for arguments, sentence in refusals:
            with pytest.raises(ValueError) as caught:
                loss(*arguments)
            assert str(caught.value) == sentence
        with pytest.raises(ValueError) as caught:
            loss([student, student[:3]], [teacher, teacher[:3]], weight, reduction="none")
        assert str(caught.value) == (
            "reduction='none' stacks the rows of all layer pairs, which have shapes (11,) and (3,); call once for each of them, or "
            "use 'mean' or 'sum'"
        )
    with pytest.raises(ValueError) as caught:
        projection_mse(student, teacher, weight, normalize=1)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == "normalize must be True or False, got 1"
