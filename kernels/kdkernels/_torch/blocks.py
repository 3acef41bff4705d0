"""The arithmetic of one block of rows, in preallocated scratch.

A block is small enough that its scratch stays in the CPU's L2 cache, so every pass below costs
arithmetic and little memory traffic. Everything is built from the two rows' unnormalised softmax:

    log_s = logits / T - shift    exp_s = exp(log_s)    sum_s = sum(exp_s)

so that p_s = exp_s / sum_s and log p_s = log_s - log sum_s; normalising is left to factors per row.
Values are sums of p times a log ratio, element by element: a difference of two log-sum-exps would
lose a small divergence in the rounding of two large numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import JSD, BuiltDivergence, ForwardKL

# Smallest normal float32 is 1.2e-38: added to the mixture of JSD, it keeps log finite where both
# probabilities underflow, and is too small to be seen anywhere else.
TINY = 2.0e-38


@dataclass(slots=True)
class Block:
    """R rows. `log_*` may be the caller's logits and are only read; the rest is scratch."""

    log_s: Tensor  # (R, V)
    log_t: Tensor  # (R, V)
    exp_s: Tensor  # (R, V)
    exp_t: Tensor  # (R, V)
    ratio: Tensor  # (R, V)
    spare: Tensor  # (R, V)
    sum_s: Tensor  # (R, 1)
    sum_t: Tensor  # (R, 1)
    careful: bool  # entries of probability 0 may come with infinite logarithms: make 0 * inf = 0


def load(logits: Tensor, bias: Tensor | None, careful: bool, scratch: Tensor) -> Tensor:
    """logits + bias, minus the row's maximum if `careful`; `logits` itself where nothing is to be done."""
    loaded = logits if logits.dtype == scratch.dtype else scratch.copy_(logits)
    if bias is not None:
        loaded = torch.add(loaded, bias.to(scratch.dtype), out=scratch)
    if careful:
        loaded = torch.sub(loaded, loaded.amax(-1, keepdim=True), out=scratch)
    return loaded


def exponentiate(log: Tensor, exp: Tensor, total: Tensor) -> None:
    """exp = exp(log), total = its row sums."""
    torch.exp(log, out=exp)
    torch.sum(exp, -1, keepdim=True, out=total)


def weighted_sum(exp: Tensor, log_ratio: Tensor, careful: bool, out: Tensor) -> Tensor:
    """Row sums (R, 1) of exp * log_ratio; entries whose exp is 0 count as 0. `out` takes the products."""
    if careful:
        log_ratio.masked_fill_(exp == 0, 0.0)
    return torch.mul(exp, log_ratio, out=out).sum(-1, keepdim=True)


def divergence_value(block: Block, divergence: BuiltDivergence) -> tuple[Tensor, Tensor]:
    """D (R, 1), and the centre (R, 1) that `divergence_gradient` subtracts from the log ratio.

    ForwardKL has no use for either afterwards.
    """
    if isinstance(divergence, JSD):
        return _jsd_value(block, divergence.beta)
    if isinstance(divergence, ForwardKL):
        torch.sub(block.log_t, block.log_s, out=block.ratio)
        centre = weighted_sum(block.exp_t, block.ratio, block.careful, out=block.ratio).div_(block.sum_t)
        return centre - (block.sum_t / block.sum_s).log_(), centre
    torch.sub(block.log_s, block.log_t, out=block.ratio)
    centre = weighted_sum(block.exp_s, block.ratio, block.careful, out=block.spare).div_(block.sum_s)
    return centre - (block.sum_s / block.sum_t).log_(), centre


def _jsd_value(block: Block, beta: float) -> tuple[Tensor, Tensor]:
    """D and centre of JSD; ratio becomes log p_s - log m."""
    # sum_s * m: the logarithm of exp_s over it is log(p_s / m), without normalising either.
    odds = block.sum_s / block.sum_t
    mixture = torch.add(block.sum_s.new_full((), TINY), block.exp_s, alpha=1.0 - beta, out=block.spare)
    mixture.addcmul_(block.exp_t, odds, value=beta)
    if block.careful:
        # Subtracting logarithms is right for probabilities of 0 as well.
        log_mixture = mixture.log_()
        torch.sub(block.log_t, log_mixture, out=block.ratio)
        teacher = weighted_sum(block.exp_t, block.ratio, True, out=block.ratio)
        torch.sub(block.log_s, log_mixture, out=block.ratio)
        centre = weighted_sum(block.exp_s, block.ratio, True, out=block.spare)
    else:
        # Without a shift log_s may be large just where p_s is large, and its rounding with it. Quotients are
        # near 1 where the student is near its teacher, and with every logarithm taken of the same
        # exponentials, their rounding moves the two distributions and not the distance between them.
        torch.div(block.exp_t, mixture, out=block.ratio).log_()
        teacher = weighted_sum(block.exp_t, block.ratio, False, out=block.ratio)
        student_ratio = torch.div(block.exp_s, mixture, out=block.spare).log_()
        centre = weighted_sum(block.exp_s, student_ratio, False, out=block.ratio)
        block.ratio, block.spare = block.spare, block.ratio
    # The same rounded `odds` as in the mixture, so that its rounding drops out of the distance.
    teacher = teacher.div_(block.sum_t).add_(odds.log())
    centre = centre.div_(block.sum_s)
    return (centre * (1.0 - beta)).add_(teacher, alpha=beta), centre


def divergence_gradient(
    block: Block,
    divergence: BuiltDivergence,
    centre: Tensor,
    scale: Tensor,  # (R, 1)
    extra: Tensor | None,  # (R, 1)
    out: Tensor,  # (R, V)
) -> None:
    """out = scale * dD/du_s + extra * p_s; overwrites the block's scratch."""
    factor = scale / block.sum_s
    if isinstance(divergence, ForwardKL):
        student_factor = factor if extra is None else factor + extra / block.sum_s
        block.exp_s.mul_(student_factor)
        torch.addcmul(block.exp_s, block.exp_t, -scale / block.sum_t, out=out)
        return
    if isinstance(divergence, JSD):
        factor.mul_(1.0 - divergence.beta)
    offset = -factor * centre
    if extra is not None:
        offset.add_(extra / block.sum_s)
    # Two passes: torch has no vectorised loop for addcmul with two operands per row.
    block.ratio.mul_(factor).add_(offset)
    torch.mul(block.exp_s, block.ratio, out=out)
