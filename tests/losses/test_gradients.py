"""How the losses behave inside autograd: derivatives, retained graphs, frozen inputs, upstream gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from kdkernels import kd_loss, linear_kd_loss, projection_mse
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, DIVERGENCES, FAST_IMPLS, IMPLS, make_case

# The triton back end computes in float32 and refuses float64, which gradcheck needs.
DOUBLE_IMPLS: list[Impl] = ["reference", "torch"]


@pytest.mark.parametrize("impl", DOUBLE_IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_gradcheck(divergence, temperature, reduction, impl: Impl) -> None:
    case = make_case(rows=4, vocabulary=7, student_width=3, teacher_width=2, dtype=torch.float64)
    options = {
        "divergence": divergence,
        "temperature": temperature,
        "ce_weight": 0.4,
        "reduction": reduction,
        "impl": impl,
    }
    weight = torch.rand(4, dtype=torch.float64, device=DEVICE)

    def linear(hidden, head, bias):
        return linear_kd_loss(
            hidden, head, case.teacher, case.labels, student_bias=bias, token_weight=weight, **options
        )

    def plain(logits):
        return kd_loss(logits, case.teacher_logits, case.labels, token_weight=weight, **options)

    assert gradcheck(linear, case.leaves())
    assert gradcheck(plain, (case.student_logits.detach().requires_grad_(),))


@pytest.mark.parametrize("impl", DOUBLE_IMPLS)
@pytest.mark.parametrize("project", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_projection(reduction, project, impl: Impl) -> None:
    student, teacher = (torch.randn(5, width, dtype=torch.float64, device=DEVICE) for width in (3, 4))
    rows, columns = (4, 3) if project == "student" else (3, 4)
    weight = torch.randn(rows, columns, dtype=torch.float64, device=DEVICE)
    bias = torch.randn(rows, dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([True, False, True, True, True], device=DEVICE)

    def loss(student, weight, bias):
        return projection_mse(
            student, teacher, weight, bias, project=project, mask=mask, reduction=reduction, impl=impl
        )

    assert gradcheck(loss, (student.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_backward_over_a_retained_graph(reduction, impl: Impl) -> None:
    case = make_case()
    leaves = case.leaves()
    logits = case.student_logits.detach().requires_grad_()
    student, weight, bias = leaves
    options = {"ce_weight": 0.5, "reduction": reduction, "impl": impl}
    for loss, inputs in (
        (linear_kd_loss(student, weight, case.teacher, case.labels, student_bias=bias, **options), leaves),
        (kd_loss(logits, case.teacher_logits, case.labels, **options), (logits,)),
    ):
        upstream = torch.rand_like(loss)
        first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        second = torch.autograd.grad(loss, inputs, -3.0 * upstream, retain_graph=True)
        third = torch.autograd.grad(loss, inputs, upstream)
        for one, two, three in zip(first, second, third, strict=True):
            torch.testing.assert_close(two, -3.0 * one)
            assert torch.equal(three, one)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_gradients_are_no_views_of_what_a_second_backward_needs(impl: Impl) -> None:
    case = make_case()
    leaves = case.leaves()
    loss = linear_kd_loss(leaves[0], leaves[1], case.teacher, student_bias=leaves[2], impl=impl)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for again, expected in zip(torch.autograd.grad(loss, leaves), kept, strict=True):
        assert torch.equal(again, expected)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_double_backward_is_refused_in_a_sentence(impl: Impl) -> None:
    case = make_case()
    hidden, weight, _ = case.leaves()
    logits = case.student_logits.detach().requires_grad_()
    student = case.student_hidden.detach().requires_grad_()
    for loss, leaf in (
        (linear_kd_loss(hidden, weight, case.teacher, impl=impl), hidden),
        (linear_kd_loss(hidden, weight, case.teacher, impl=impl, reduction="none").sum(), weight),
        (kd_loss(logits, case.teacher_logits, impl=impl), logits),
        (projection_mse(student, torch.zeros_like(student), impl=impl), student),
    ):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="kdkernels losses have no second derivative"):
            torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradient_without_strides(impl: Impl) -> None:
    """`rows.sum()` and `loss.expand(...)` hand a gradient to backward whose strides are all 0."""
    case = make_case()
    hidden, weight, _ = case.leaves()
    logits = case.student_logits.detach().requires_grad_()

    rows = linear_kd_loss(hidden, weight, case.teacher, case.labels, reduction="none", impl=impl)
    total = linear_kd_loss(hidden, weight, case.teacher, case.labels, reduction="sum", impl=impl)
    for ours, other in zip(
        torch.autograd.grad(rows.sum(), (hidden, weight)),
        torch.autograd.grad(total.expand(3).sum() / 3.0, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, other)

    rows = kd_loss(logits, case.teacher_logits, case.labels, reduction="none", impl=impl)
    total = kd_loss(logits, case.teacher_logits, case.labels, reduction="sum", impl=impl)
    (ours,) = torch.autograd.grad(rows.expand(2, -1).sum() / 2.0, logits)
    (other,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
# Every subset of (hidden, weight, bias) that a user may freeze.
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
@pytest.mark.interpreted(5)
def test_frozen_inputs_get_no_gradient_and_change_no_other(wanted, reduction, impl: Impl) -> None:
    case = make_case(rows=6)
    full = case.leaves()
    options = {"reduction": reduction, "impl": impl, "ce_weight": 0.5}
    loss = linear_kd_loss(full[0], full[1], case.teacher, case.labels, student_bias=full[2], **options)
    expected = torch.autograd.grad(loss.sum(), full)

    leaves = case.leaves()
    for leaf, needed in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(bool(needed))
    loss = linear_kd_loss(leaves[0], leaves[1], case.teacher, case.labels, student_bias=leaves[2], **options)
    loss.sum().backward()
    for leaf, needed, gradient in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == bool(needed)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_cost_no_product(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the products of the schedule that would make the gradient of the frozen side."""
    from kdkernels.logits import by_rows

    calls = {"hidden": 0, "weight": 0}
    for name, function in (("hidden", "hidden_gradient"), ("weight", "add_weight_gradient")):
        original = getattr(by_rows, function)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(by_rows, function, counted)
    case = make_case()
    hidden, weight, _ = case.leaves()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_kd_loss(hidden, weight, case.teacher, case.labels, impl="torch").backward()
    assert calls.pop(frozen) == 0
    assert min(calls.values()) > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_differentiate(impl: Impl) -> None:
    case = make_case()
    loss = linear_kd_loss(case.student_hidden, case.student_weight, case.teacher, impl=impl)
    assert not loss.requires_grad
    hidden, weight, _ = case.leaves()
    with torch.no_grad():
        assert not linear_kd_loss(hidden, weight, case.teacher, impl=impl).requires_grad
        assert not kd_loss(case.student_logits, case.teacher_logits, impl=impl).requires_grad


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_float16_gradients_survive_a_loss_scale(impl: Impl) -> None:
    """Single logit gradients are far below the smallest float16 here; scaled by 2**16 the sums are not."""
    case = make_case(rows=9, vocabulary=130, dtype=torch.float16, ignored_every=None)
    hidden, weight, _ = case.leaves()
    double = case.to(torch.float64)
    exact_hidden, exact_weight, _ = double.leaves()
    options = {"num_items_in_batch": 10_000_000, "temperature": 1.0}
    scale = 2.0**16
    loss = linear_kd_loss(hidden, weight, case.teacher_logits.detach(), impl=impl, **options)
    gradients = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, scale))
    exact = linear_kd_loss(
        exact_hidden, exact_weight, case.teacher_logits.detach().double(), impl="reference", **options
    )
    expected = torch.autograd.grad(exact, (exact_hidden, exact_weight), torch.full_like(exact, scale))
    for ours, other in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float16
        step = torch.finfo(torch.float16).eps * other.abs().max().item()
        torch.testing.assert_close(ours.double(), other, rtol=4e-3, atol=2 * step)


def test_inputs_changed_in_place_are_noticed() -> None:
    """Where the gradient is computed in backward, that is."""
    case = make_case(dtype=torch.float16)
    logits, teacher = case.student_logits.detach().requires_grad_(), case.teacher_logits.clone()
    loss = kd_loss(logits, teacher, impl="torch")
    teacher.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
