"""The gradient from the state that the values kept: the numbers of one launch for both, in one pass over the rows."""

from typing import Any

import pytest
import torch

from kdkernels import kd_loss

pytest.importorskip("triton")

from kdkernels._triton import ROW_STATE, kd_gradient, kd_rows
from kdkernels.divergences import Decoupled, Divergence, ForwardKL, SkewKL
from kdkernels.options import LogitTransform, RowTerms
from tests.support.row_kernels import DEVICE, DIVERGENCES, ROWS, SMALL, inputs, name, options_for

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cross entropy": {"ce_weight": 0.5},
    "tempered": {"temperature": 2.0, "ce_weight": 0.5, "label_smoothing": 0.1},
    "capped": {"temperature": 0.5, "student_transform": LogitTransform(0.7, 9.0)},
}


@pytest.mark.parametrize("vocab_map", [None, 100, "index"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.interpreted(7)
def test_two_launches_equal_one(divergence: Divergence, options: dict[str, Any], vocab_map: Any) -> None:
    student, teacher, labels = inputs(230)
    if vocab_map == "index":
        vocab_map = torch.arange(230, device=DEVICE).roll(3)
        vocab_map[5] = -1
    elif vocab_map is not None:
        teacher = teacher[:, :vocab_map]
    terms = RowTerms(divergence, **options)
    weight = torch.tensor([0.5, 0.0, -2.0], device=DEVICE)
    rest: dict[str, Any] = {"row_weight": weight, "vocab_map": vocab_map, "config": SMALL} | options_for(
        divergence
    )
    one, two = torch.empty_like(student), torch.empty_like(student)
    expected = kd_rows(student, teacher, labels, terms, grad=one, **rest)
    state = torch.empty((ROW_STATE, ROWS), device=DEVICE)
    values = kd_rows(student, teacher, labels, terms, state=state, **rest)
    kd_gradient(student, teacher, labels, terms, state=state, grad=two, **rest)
    assert torch.equal(two, one) and torch.equal(values[1], expected[1])
    assert torch.equal(values[0], expected[0])


@pytest.mark.parametrize("divergence", [ForwardKL(), SkewKL(0.2), Decoupled()], ids=name)
def test_statistics_and_a_second_backward(divergence: Divergence) -> None:
    """Statistics beside the state; a retained graph with another upstream gradient."""
    student, teacher, labels = inputs(230)
    student = student.bfloat16().requires_grad_()
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.5}
    loss, stats = kd_loss(student, teacher, labels, impl="triton", return_stats=True, **options)
    exact, exact_stats = kd_loss(
        student.detach().double(), teacher.double(), labels, impl="torch", return_stats=True, **options
    )
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        stats.student_entropy.double(), exact_stats.student_entropy, rtol=1e-5, atol=1e-5
    )
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(2.0, device=DEVICE))
    assert first.dtype == torch.bfloat16 and torch.equal(second, 2.0 * first)
