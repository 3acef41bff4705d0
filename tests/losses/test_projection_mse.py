"""`projection_mse` against `F.mse_loss` of the counted rows, in fp64 and at the inputs' dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import projection_mse
from kdkernels.options import Impl, Project
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS
from tests.support.rounding import truths

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def make_inputs(
    project: Project,
    dtype: torch.dtype = torch.float32,
    rows: int = 11,
    projected: bool = True,
    widths: tuple[int, int] = (6, 9),
) -> Inputs:
    """Student (N, D_s), teacher (N, D_t), weight and bias; both of width D_t without a projection."""
    student = torch.randn(rows, widths[0] if projected else widths[1])
    teacher = torch.randn(rows, widths[1])
    source, target = (student, teacher) if project == "student" else (teacher, student)
    weight = torch.randn(target.shape[1], source.shape[1])
    tensors = (student, teacher, weight, torch.randn(target.shape[1]))
    student, teacher, weight, bias = (tensor.to(DEVICE, dtype) for tensor in tensors)
    return (student, teacher, weight, bias) if projected else (student, teacher, None, None)


def eager(inputs: Inputs, project: Project, mask: Tensor | None) -> tuple[Tensor, ...]:
    """`F.mse_loss` of the counted rows in float64, and its gradients for student, weight and bias."""
    student, teacher, weight, bias = (
        None if tensor is None else tensor.detach().double().requires_grad_(index != 1)
        for index, tensor in enumerate(inputs)
    )
    assert student is not None and teacher is not None
    source, target = (student, teacher) if project == "student" else (teacher, student)
    projected = source if weight is None else F.linear(source, weight, bias)
    if mask is not None:
        projected, target = projected[mask], target[mask]
    loss = F.mse_loss(projected, target)
    leaves = [leaf for leaf in (student, weight, bias) if leaf is not None]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("project", "projected"), [("student", True), ("teacher", True), ("student", False)])
def test_equals_mse_of_the_counted_rows(project: Project, projected, masked, dtype, impl: Impl) -> None:
    inputs = make_inputs(project, dtype, projected=projected)
    mask = torch.arange(11, device=DEVICE) % 3 != 0 if masked else None
    truth = truths(lambda: eager(inputs, project, mask))
    leaves = [tensor.requires_grad_() for tensor in (inputs[0], *inputs[2:]) if tensor is not None]
    loss = projection_mse(*inputs, project=project, mask=mask, impl=impl)
    assert loss.dtype == torch.float32
    assert_within_budget(loss, truth[0], "loss")
    for index, gradient in enumerate(torch.autograd.grad(loss, leaves)):
        assert gradient.dtype == dtype
        assert_within_budget(gradient, truth[1 + index], f"gradient {index}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("project", ["student", "teacher"])
def test_reductions_and_leading_axes(project: Project, impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs(project, rows=12)
    assert weight is not None
    mask = torch.arange(12, device=DEVICE) % 4 != 1
    flat = projection_mse(
        student, teacher, weight, bias, project=project, mask=mask, reduction="none", impl=impl
    )
    assert torch.equal(flat == 0, ~mask)
    options = {"project": project, "mask": mask.view(3, 4), "impl": impl}
    shaped = (student.view(3, 4, 6), teacher.view(3, 4, 9), weight, bias)
    rows = projection_mse(*shaped, reduction="none", **options)
    assert rows.shape == (3, 4)
    torch.testing.assert_close(rows.view(-1), flat)
    torch.testing.assert_close(projection_mse(*shaped, reduction="sum", **options), flat.sum())
    width = weight.shape[0]
    torch.testing.assert_close(projection_mse(*shaped, **options), flat.sum() / (mask.sum() * width))


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_gradient_of_single_rows(impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs("student")
    assert weight is not None
    leaves = (student.requires_grad_(), weight.requires_grad_())
    upstream = torch.rand(11, device=DEVICE)
    rows = projection_mse(*leaves[:1], teacher, weight, bias, reduction="none", impl=impl)
    reference = projection_mse(*leaves[:1], teacher, weight, bias, reduction="none", impl="reference")
    first = torch.autograd.grad(rows, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(rows, leaves, 2.0 * upstream)
    expected = torch.autograd.grad(reference, leaves, upstream)
    for one, two, exact in zip(first, again, expected, strict=True):
        torch.testing.assert_close(one, exact)
        torch.testing.assert_close(two, 2.0 * exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("project", ["student", "teacher"])
def test_masked_rows_may_hold_anything(project: Project, impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs(project)
    assert weight is not None
    mask = torch.arange(11, device=DEVICE) % 3 != 0

    def solve() -> tuple[Tensor, ...]:
        leaves = (student.clone().requires_grad_(), weight.clone().requires_grad_())
        loss = projection_mse(leaves[0], teacher, leaves[1], bias, project=project, mask=mask, impl=impl)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    expected = solve()
    for junk in (float("nan"), 1e30):
        student[~mask] = teacher[~mask] = junk
        for ours, other in zip(solve(), expected, strict=True):
            torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_counts(rows: int, impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs("student", rows=rows)
    assert weight is not None
    leaves = (student.requires_grad_(), weight.requires_grad_())
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        loss = projection_mse(student, teacher, weight, bias, mask=mask, reduction=reduction, impl=impl)
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient in torch.autograd.grad(loss.sum(), leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_autocast_casts_the_projection_only(impl: Impl) -> None:
    student, teacher, weight, bias = make_inputs("student")
    assert weight is not None
    leaves = (student.requires_grad_(), weight.requires_grad_())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = projection_mse(student, teacher, weight, bias, impl=impl)
    rounded = projection_mse(
        student.bfloat16().float(), teacher, weight.bfloat16().float(), bias, impl="reference"
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, rounded, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(rounded, leaves), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
