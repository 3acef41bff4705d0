"""The direction kernel by itself, in the interpreter: tiles, tails, strides, dtypes."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kdkernels._triton.directions import direction_rows
from kdkernels._triton.launch import RowConfig
from kdkernels._triton.projection import mse_rows
from kdkernels.reference.features import unit_rows
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE
from tests.support.rounding import truths

SMALL = RowConfig(block=64, width=8, num_warps=1)
ROWS = 4


def reference(
    prediction: Tensor, target: Tensor, bias: Tensor, weight: Tensor, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances and the gradients of their weighted sum, with everything in float64."""
    sides = [side.detach().double().requires_grad_() for side in (prediction, target)]
    a, b = unit_rows(sides[0] + bias.double()), unit_rows(sides[1])
    values = 1.0 - (a * b).sum(-1) if cosine else (a - b).square().sum(-1)
    grad_prediction, grad_target = torch.autograd.grad((values * weight.double()).sum(), sides)
    return values.detach(), grad_prediction, grad_target


# 1, 37: one masked tile; 64: one full tile; 130: full tiles and a tail.
@pytest.mark.parametrize("width", [1, 37, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cosine", [True, False])
def test_directions(cosine: bool, dtype: torch.dtype, width: int) -> None:
    wide = torch.randn(2, ROWS, width + 3, device=DEVICE)
    prediction, target = wide[0, :, :width], wide[1, :, :width].to(dtype)  # a row stride above the width
    bias = torch.randn(width, device=DEVICE)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)
    target[2] = 0.0
    exact = truths(lambda: reference(prediction, target, bias, weight, cosine))
    prediction[1] = target[1] = float("nan")
    kept, grad_target = prediction.clone(), torch.empty(ROWS, width, device=DEVICE)
    values = direction_rows(
        prediction, target, cosine=cosine, bias=bias, row_weight=weight, grad_target=grad_target, config=SMALL
    )
    live = [0, 2, 3]
    zero = torch.zeros(width, device=DEVICE)
    assert values[1] == 0.0 and torch.equal(prediction[1], zero) and torch.equal(grad_target[1], zero)
    for name, actual, truth in zip(
        ("value", "prediction", "target"), (values, prediction, grad_target), exact, strict=True
    ):
        # At width 1 every direction is 1 or -1, and the gradient is nothing but rounding.
        if width > 1 or name == "value":
            assert_within_budget(actual[live], truth[live], name)

    only_values = direction_rows(
        kept, target, cosine=cosine, bias=bias, row_weight=weight, write_grad=False, config=SMALL
    )
    torch.testing.assert_close(only_values, values, rtol=0, atol=0)
    torch.testing.assert_close(kept, torch.where(weight[:, None] == 0, float("nan"), kept), equal_nan=True)


# 130: full tiles and a tail, all of them over tiles that were read.
@pytest.mark.parametrize("width", [37, 130])
@pytest.mark.parametrize("kind", ["squared", "direction"])
def test_a_half_gradient_in_the_memory_of_the_prediction(kind: str, width: int) -> None:
    buffer, target = torch.randn(2, ROWS, 144, device=DEVICE)
    prediction, target = buffer[:, :width], target[:, :width].bfloat16()
    bias = torch.randn(width, device=DEVICE)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)
    options: dict[str, Any] = {"bias": bias, "row_weight": weight, "config": SMALL}

    def solve(rows: Tensor, **gradient: Tensor) -> Tensor:
        if kind == "squared":
            return mse_rows(rows, target, **gradient, **options)
        return direction_rows(rows, target, cosine=True, **gradient, **options)

    in_place = prediction.clone()
    expected = solve(in_place)
    narrow = buffer.view(torch.bfloat16)[:, :width]
    assert torch.equal(solve(prediction, grad=narrow), expected)
    torch.testing.assert_close(narrow.float(), in_place, rtol=2.0**-8, atol=0.0)


def test_refusals_and_no_rows() -> None:
    empty = torch.empty(0, 5, device=DEVICE)
    assert direction_rows(empty, empty, cosine=True).shape == (0,)
    rows = torch.randn(2, 5, device=DEVICE)
    with pytest.raises(ValueError, match="computes in float32, got target in float64; use impl='torch'"):
        direction_rows(rows, rows.double(), cosine=True)
