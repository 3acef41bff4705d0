"""The row kernels of top-k and cross-term teachers, run by Triton's interpreter, against fp64."""

import pytest
import torch
from torch import Tensor

from kdkernels._triton.kd.softmax import row_statistics, softmax_gradient
from tests.support.budget import assert_within_budget
from tests.support.rounding import truths
from tests.support.row_kernels import DEVICE, ROWS, SMALL


def rows_of(vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Logits of a few rows, some of them lifted out."""
    logits = torch.randn(ROWS, vocabulary, device=DEVICE) * 3 + 2
    logits[:, 1::5] = float("-inf")
    return logits.to(dtype)


# 1, 37: one masked tile; 64: one full tile; 130: full tiles and a tail.
@pytest.mark.parametrize("vocabulary", [1, 37, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# At 1 both rows are one number, which is computed once.
@pytest.mark.parametrize(("temperature", "at_one"), [(1.0, True), (2.5, True), (0.5, False)])
def test_row_statistics(vocabulary: int, dtype: torch.dtype, temperature: float, at_one: bool):
    logits = rows_of(vocabulary, dtype)
    found = row_statistics(logits, temperature=temperature, at_one=at_one, config=SMALL)
    assert found.shape == (3, ROWS) and found.dtype == torch.float32
    zero = logits.float().amax(1, keepdim=True)
    zero = zero.masked_fill(zero == float("-inf"), 0.0)
    assert torch.equal(found[0], zero.squeeze(1))
    for part, heat in zip(found[1:], (temperature, 1.0 if at_one else temperature), strict=True):
        shifted = logits.double() - zero.double()
        (truth,) = truths(lambda shifted=shifted, heat=heat: ((shifted / heat).logsumexp(1),))
        assert_within_budget(part, truth, "log-sum-exp")


def test_rows_of_nothing_and_rows_that_do_not_count():
    logits = rows_of(130, torch.float32)
    logits[0] = float("-inf")
    logits[1] = float("nan")
    weight = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    found = row_statistics(logits, temperature=2.0, at_one=True, row_weight=weight, config=SMALL)
    assert found[0, 0] == 0.0 and found[1:, 0].eq(float("-inf")).all()
    assert found[:, 1].eq(0.0).all() and found[:, 2].isfinite().all()


def expected(
    logits: Tensor,
    statistics: Tensor,
    factors: tuple[Tensor | None, ...],
) -> Tensor:
    """The gradient at temperature 2.5 from the same statistics."""
    statistics = statistics.unsqueeze(2)
    factor, factor_at_one, constant = (None if part is None else part.unsqueeze(1) for part in factors)
    assert factor is not None
    logits = logits - statistics[0]
    gradient = factor * (logits / 2.5 - statistics[1]).exp()
    if factor_at_one is not None:
        gradient = gradient + factor_at_one * (logits - statistics[2]).exp()
    return gradient if constant is None else gradient + constant


@pytest.mark.parametrize("vocabulary", [37, 64, 130])
# In place; into a half tensor of its own; into the first half of the bytes of each row.
@pytest.mark.parametrize("place", ["over", "half", "half over"])
# With and without the second softmax and the constant.
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_softmax_gradient(vocabulary: int, place: str, terms: int):
    logits = rows_of(vocabulary, torch.float32)
    factor, factor_at_one, constant = torch.randn(3, ROWS, device=DEVICE)
    factors = (factor, factor_at_one if terms > 1 else None, constant if terms > 2 else None)
    statistics = row_statistics(logits, temperature=2.5, at_one=True, config=SMALL)
    wide = (
        logits.double(),
        statistics.double(),
        tuple(None if part is None else part.double() for part in factors),
    )
    (exact,) = truths(lambda: (expected(*wide),))
    buffer = torch.full((ROWS, -(-vocabulary // 16) * 16), float("nan"), device=DEVICE)
    buffer[:, :vocabulary] = logits
    logits = buffer[:, :vocabulary]
    if place == "over":
        grad = logits
    elif place == "half over":
        grad = buffer.view(torch.bfloat16)[:, :vocabulary]
    else:
        grad = torch.empty_like(logits, dtype=torch.bfloat16)
    softmax_gradient(logits, statistics, *factors, temperature=2.5, grad=grad, config=SMALL)
    assert_within_budget(grad, exact, "gradient")
    assert buffer[:, vocabulary:].isnan().all()


def test_rows_without_factors_are_zeros():
    logits = rows_of(130, torch.float32)
    statistics = torch.full((3, ROWS), float("nan"), device=DEVICE)
    logits[:2] = float("nan")
    factor = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)
    at_one = torch.tensor([0.0, 0.0, float("nan")], device=DEVICE)
    constant = torch.ones(ROWS, device=DEVICE)
    softmax_gradient(logits, statistics, factor, at_one, constant, temperature=1.0, grad=logits, config=SMALL)
    assert torch.equal(logits[:2], torch.zeros_like(logits[:2])) and logits[2].isnan().all()
