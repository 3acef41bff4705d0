"""Row functions of the feature losses: distances between two features, and their gradients in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import LEAST_LENGTH


def _unit(rows: Tensor, dead: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """out = rows of length 1; 1 / length (R, 1) and the new length, 1.0 or 0.0 where there is no direction."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=out.dtype)
    short = length < LEAST_LENGTH
    if dead is not None:
        short = short | dead
    inverse = length.reciprocal().masked_fill_(short, 0.0)
    torch.mul(rows, inverse, out=out)
    if dead is not None:
        out.masked_fill_(dead, 0.0)  # 0 * NaN
    return inverse, (~short).to(out.dtype)


def direction_rows(
    prediction: Tensor,
    target: Tensor,
    *,
    cosine: bool,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    write_grad: bool = True,
    grad_target: Tensor | None = None,
) -> Tensor:
    """1 - cosine or squared difference (R,) of the unit vectors a and b; both gradients from a - b.

    The contract is `kdkernels.backends.Backend.direction_rows`. 1 - <a, b> is taken as half of |a - b|^2, which keeps
    its digits where the two sides agree; <a, a - b>, the part of the gradient along a, likewise.
    """
    if bias is not None:
        prediction.add_(bias)
    dead = None if row_weight is None else row_weight.unsqueeze(1) == 0
    inverse_p, one_p = _unit(prediction, dead, prediction)
    difference = torch.empty_like(prediction)
    inverse_t, one_t = _unit(target, dead, difference)
    torch.sub(prediction, difference, out=difference)
    squares = torch.linalg.vecdot(difference, difference).unsqueeze(1)
    if write_grad:
        factor = one_p.new_full((), 1.0 if cosine else 2.0)
        if row_weight is not None:
            factor = row_weight.unsqueeze(1) * factor
        if grad_target is not None:
            # The target's unit vector is a - difference.
            along = (squares + one_t - one_p) / 2
            torch.mul(difference, along - 1.0, out=grad_target)
            grad_target.addcmul_(prediction, along, value=-1.0).mul_(inverse_t * factor)
        along = (squares + one_p - one_t) / 2
        torch.addcmul(difference, prediction, along, value=-1.0, out=prediction).mul_(inverse_p * factor)
    if cosine:
        squares = (squares + (2.0 - one_p - one_t)) / 2
        if dead is not None:
            squares = squares.masked_fill(dead, 0.0)
    return squares.squeeze(1)
