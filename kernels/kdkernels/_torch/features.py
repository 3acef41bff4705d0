"""Row functions of the feature losses: distances between two features, and their gradients in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import inverse_length


def mse_rows(
    prediction: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    write_grad: bool = True,
    grad: Tensor | None = None,
) -> Tensor:
    """Sums of squared differences (R,); `prediction` becomes 2 * (prediction - target) * row_weight.

    The contract is `core.backend.Backend.mse_rows`.
    """
    if bias is not None:
        prediction.add_(bias)
    prediction.sub_(target)
    masked = _masked(row_weight)
    if masked is not None:
        prediction.masked_fill_(masked, 0.0)
    # A norm is one pass; torch.linalg.vecdot is a GEMM for each row.
    total = torch.linalg.vector_norm(prediction, dim=-1).square_()
    if write_grad:
        prediction.mul_(2.0 if row_weight is None else row_weight.unsqueeze(1) * 2.0)
        _narrow(prediction, grad)
    return total


def _narrow(gradient: Tensor, grad: Tensor | None) -> None:
    """Write a gradient that is not yet where it belongs; `grad` may be narrower numbers in the same memory."""
    if grad is not None and grad.dtype != gradient.dtype:
        grad.copy_(gradient.to(grad.dtype))


def _masked(row_weight: Tensor | None) -> Tensor | None:
    """(R, 1) rows of weight 0, whatever they hold; None where there are none, which only a CPU can look at for free."""
    if row_weight is None:
        return None
    masked = row_weight.unsqueeze(1) == 0
    return None if masked.device.type == "cpu" and not bool(masked.any()) else masked


def _unit(rows: Tensor, masked: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """out = rows of length 1; 1 / length (R, 1) and the new length, 1.0 or 0.0 where there is no direction.

    NaN where the squares are too large for the dtype.
    """
    inverse = inverse_length(torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=out.dtype))
    if masked is not None:
        inverse.masked_fill_(masked, 0.0)
    torch.mul(rows, inverse, out=out)
    if masked is not None:
        out.masked_fill_(masked, 0.0)  # 0 * NaN
    return inverse, (inverse != 0.0).to(out.dtype)


def direction_rows(
    prediction: Tensor,
    target: Tensor,
    *,
    cosine: bool,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    write_grad: bool = True,
    grad: Tensor | None = None,
    grad_target: Tensor | None = None,
) -> Tensor:
    """1 - cosine or squared difference (R,) of the unit vectors a and b; both gradients from a - b.

    The contract is `core.backend.Backend.direction_rows`. 1 - <a, b> is taken as half of |a - b|^2, which keeps
    its digits where the two sides agree.
    """
    if bias is not None:
        prediction.add_(bias)
    masked = _masked(row_weight)
    inverse_p, one_p = _unit(prediction, masked, prediction)
    difference = torch.empty_like(prediction)
    inverse_t, one_t = _unit(target, masked, difference)
    torch.sub(prediction, difference, out=difference)
    squares = torch.linalg.vector_norm(difference, dim=-1, keepdim=True).square_()
    if write_grad:
        # No angle, no gradient: with one side of length 0 it would be rounding.
        factor = one_p * one_t * (1.0 if cosine else 2.0)
        if row_weight is not None:
            factor = row_weight.unsqueeze(1) * factor
        # <a, a - b> by a product: what rounding did to the length of a is a multiple of a, and goes with this part.
        along = (prediction * difference).sum(1, keepdim=True)
        if grad_target is not None:
            # The target's unit vector b is a - difference, and <b, b - a> is the rest of |a - b|^2.
            rest = squares - along
            torch.mul(difference, rest - 1.0, out=grad_target)
            grad_target.addcmul_(prediction, rest, value=-1.0).mul_(inverse_t * factor)
        torch.addcmul(difference, prediction, along, value=-1.0, out=prediction).mul_(inverse_p * factor)
        _narrow(prediction, grad)
    if cosine:
        squares = (squares + (2.0 - one_p - one_t)) / 2
        if masked is not None:
            squares = squares.masked_fill(masked, 0.0)
    return squares.squeeze(1)
