"""The arithmetic of one block of rows, in place in preallocated scratch.

A block is small enough that its scratch stays in the CPU's L2 cache, so every pass below costs
arithmetic and no memory traffic. Everything is built from the two rows' unnormalised softmax:

    log_s = u_s - max(u_s)    exp_s = exp(log_s)    sum_s = sum(exp_s)    with u = logits / T

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
    """One block of R rows. `log_*`, `exp_*` and `spare` are (R, V) scratch, `sum_*` are (R, 1)."""

    log_s: Tensor
    log_t: Tensor
    exp_s: Tensor
    exp_t: Tensor
    spare: Tensor
    sum_s: Tensor
    sum_t: Tensor
    guard: bool  # entries of probability 0 may come with infinite logarithms: make 0 * inf = 0


def load(logits: Tensor, bias: Tensor | None, log: Tensor) -> None:
    """log = logits + bias - the row's maximum."""
    source = logits
    if bias is not None or logits.dtype != log.dtype:
        source = log.copy_(logits)
        if bias is not None:
            source.add_(bias)
    torch.sub(source, source.amax(-1, keepdim=True), out=log)


def exponentiate(log: Tensor, exp: Tensor, total: Tensor) -> None:
    """exp = exp(log), total = its row sums."""
    torch.exp(log, out=exp)
    torch.sum(exp, -1, keepdim=True, out=total)


def weighted_sum(exp: Tensor, log_ratio: Tensor, guard: bool, out: Tensor) -> Tensor:
    """Row sums (R, 1) of exp * log_ratio; entries whose exp is 0 count as 0. `out` takes the products."""
    if guard:
        log_ratio.masked_fill_(exp == 0, 0.0)
    return torch.mul(exp, log_ratio, out=out).sum(-1, keepdim=True)


def divergence_value(block: Block, divergence: BuiltDivergence) -> tuple[Tensor, Tensor]:
    """D (R, 1), and the centre (R, 1) that `divergence_gradient` subtracts from the log ratio left in log_s.

    Overwrites log_t; ForwardKL leaves log_s alone and has no use for a centre.
    """
    if isinstance(divergence, JSD):
        return _jsd_value(block, divergence.beta)
    if isinstance(divergence, ForwardKL):
        ratio = block.log_t.sub_(block.log_s)
        centre = weighted_sum(block.exp_t, ratio, block.guard, out=ratio).div_(block.sum_t)
        return centre - (block.sum_t / block.sum_s).log_(), centre
    ratio = block.log_s.sub_(block.log_t)
    centre = weighted_sum(block.exp_s, ratio, block.guard, out=block.log_t).div_(block.sum_s)
    return centre - (block.sum_s / block.sum_t).log_(), centre


def _jsd_value(block: Block, beta: float) -> tuple[Tensor, Tensor]:
    """D and centre of JSD; log_s becomes log p_s - log m."""
    # sum_s * m, so that subtracting its logarithm from log_s gives log(p_s / m) without another pass.
    mixture = torch.add(block.sum_s.new_full((), TINY), block.exp_s, alpha=1.0 - beta, out=block.spare)
    log_mixture = mixture.addcmul_(block.exp_t, block.sum_s / block.sum_t, value=beta).log_()
    student_ratio = block.log_s.sub_(log_mixture)
    teacher_ratio = block.log_t.sub_(log_mixture)
    teacher = weighted_sum(block.exp_t, teacher_ratio, block.guard, out=teacher_ratio).div_(block.sum_t)
    teacher.sub_((block.sum_t / block.sum_s).log_())
    centre = weighted_sum(block.exp_s, student_ratio, block.guard, out=block.spare).div_(block.sum_s)
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
        torch.mul(block.exp_s, student_factor, out=block.exp_s)
        torch.addcmul(block.exp_s, block.exp_t, -scale / block.sum_t, out=out)
        return
    if isinstance(divergence, JSD):
        factor.mul_(1.0 - divergence.beta)
    offset = -factor * centre
    if extra is not None:
        offset.add_(extra / block.sum_s)
    torch.addcmul(offset, block.log_s, factor, out=block.log_s)
    torch.mul(block.exp_s, block.log_s, out=out)
