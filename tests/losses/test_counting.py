"""Which rows count and what the three reductions make of them."""

import pytest
import torch

from kdkernels import kd_loss, linear_kd_loss
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS, loss_and_gradients, make_case


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(impl: Impl) -> None:
    case = make_case()

    def loss(**options):
        return linear_kd_loss(
            case.student_hidden,
            case.student_weight,
            case.teacher,
            case.labels,
            ce_weight=0.3,
            impl=impl,
            **options,
        )

    rows = loss(reduction="none")
    counted = case.labels != -100
    assert torch.equal(rows == 0, ~counted)
    torch.testing.assert_close(loss(reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(), rows.sum() / counted.sum())
    torch.testing.assert_close(loss(num_items_in_batch=40), rows.sum() / 40)
    torch.testing.assert_close(loss(num_items_in_batch=torch.tensor(40, device=DEVICE)), rows.sum() / 40)
    torch.testing.assert_close(loss(num_items_in_batch=torch.tensor(40)), rows.sum() / 40)


@pytest.mark.parametrize("impl", IMPLS)
def test_token_weight(impl: Impl) -> None:
    case = make_case()
    weight = torch.rand(len(case.labels), device=DEVICE)
    weight[1] = 0.0  # counted by its label, but worth nothing
    weight[0] = float("nan")  # ignored by its label, so never looked at
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    plain = linear_kd_loss(*arguments, reduction="none", impl=impl)
    expected = plain * weight.masked_fill(case.labels == -100, 0.0)
    rows = linear_kd_loss(*arguments, reduction="none", token_weight=weight, impl=impl)
    torch.testing.assert_close(rows, expected)
    total = weight[case.labels != -100].sum()
    mean = linear_kd_loss(*arguments, token_weight=weight, impl=impl)
    torch.testing.assert_close(mean, expected.sum() / total)
    divided = linear_kd_loss(*arguments, token_weight=weight, num_items_in_batch=7, impl=impl)
    torch.testing.assert_close(divided, expected.sum() / 7)

    # The gradient of a weighted mean is the weighted mean of gradients.
    _, *gradients = loss_and_gradients(case, case.labels, impl, token_weight=weight)
    hidden, head, bias = case.leaves()
    each = linear_kd_loss(
        hidden, head, case.teacher, case.labels, student_bias=bias, reduction="none", impl=impl
    )
    exact = torch.autograd.grad(each, (hidden, head, bias), weight.nan_to_num() / total)
    for ours, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# All rows ignored, and no rows at all.
@pytest.mark.parametrize("rows", [5, 0])
def test_nothing_counts(rows, reduction, impl: Impl) -> None:
    case = make_case(rows=rows, ignored_every=1)
    hidden, weight, bias = case.leaves()
    logits = case.student_logits.requires_grad_()
    for loss, leaves in (
        (
            linear_kd_loss(
                hidden, weight, case.teacher, case.labels, student_bias=bias, reduction=reduction, impl=impl
            ),
            (hidden, weight, bias),
        ),
        (kd_loss(logits, case.teacher_logits, case.labels, reduction=reduction, impl=impl), (logits,)),
    ):
        assert loss.shape == ((rows,) if reduction == "none" else ())
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_ignored_rows_may_hold_anything(junk, static_shapes, impl: Impl) -> None:
    case = make_case()
    clean = loss_and_gradients(case, case.labels, impl, ce_weight=0.5, static_shapes=static_shapes)
    ignored = case.labels == -100
    case.student_hidden[ignored] = junk
    case.teacher_hidden[ignored] = junk
    dirty = loss_and_gradients(case, case.labels, impl, ce_weight=0.5, static_shapes=static_shapes)
    for ours, other in zip(dirty, clean, strict=True):
        torch.testing.assert_close(ours, other)
    assert torch.equal(dirty[1][ignored], torch.zeros_like(dirty[1][ignored]))

    logits, teacher = case.student_logits.detach(), case.teacher_logits
    logits[ignored] = teacher[ignored] = junk
    logits.requires_grad_()
    for reduction in ("sum", "none"):
        loss = kd_loss(logits, teacher, case.labels, ce_weight=0.5, reduction=reduction, impl=impl)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))


@pytest.mark.parametrize("impl", IMPLS)
def test_another_ignore_index_inside_the_vocabulary(impl: Impl) -> None:
    case = make_case()
    labels = case.labels.masked_fill(case.labels == -100, 0)
    moved = case.labels.where(case.labels != 0, torch.full_like(case.labels, -100))
    arguments = (case.student_hidden, case.student_weight, case.teacher)
    actual = linear_kd_loss(*arguments, labels, ce_weight=1.0, ignore_index=0, impl=impl)
    torch.testing.assert_close(actual, linear_kd_loss(*arguments, moved, ce_weight=1.0, impl=impl))


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_static_shapes_change_nothing(impl: Impl) -> None:
    case = make_case()
    for reduction in ("mean", "sum"):
        options = {"ce_weight": 0.5, "reduction": reduction, "chunk_bytes": 8 * 67 * 4}
        compacted = loss_and_gradients(case, case.labels, impl, **options)
        static = loss_and_gradients(case, case.labels, impl, static_shapes=True, **options)
        for ours, other in zip(static, compacted, strict=True):
            torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_accumulation_of_one_row_eight_times_equals_eight_rows_once(impl: Impl) -> None:
    """Uneven masks: the micro-batches hold 5, 0, 3, 1, ... counted tokens."""
    case = make_case(rows=8 * 5, ignored_every=None)
    labels = case.labels.view(8, 5)
    for row, kept in enumerate((5, 0, 3, 1, 2, 5, 4, 1)):
        labels[row, kept:] = -100
    items = int((labels != -100).sum())
    options = {"ce_weight": 0.5, "temperature": 2.0, "impl": impl}

    hidden, weight, _ = case.leaves()
    whole = linear_kd_loss(hidden, weight, case.teacher_logits, labels.view(-1), **options)
    whole.backward()
    expected = (hidden.grad, weight.grad)

    hidden, weight, _ = case.leaves()
    total = 0.0
    for row in range(8):
        here = slice(5 * row, 5 * row + 5)
        loss = linear_kd_loss(
            hidden[here], weight, case.teacher_logits[here], labels[row], num_items_in_batch=items, **options
        )
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
