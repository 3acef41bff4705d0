"""The arithmetic of one block of rows, in preallocated scratch.

A block is small enough that its scratch stays in the CPU's L2 cache, so every pass below costs
arithmetic and little memory traffic. Everything is built from the two rows' unnormalised softmax:

    log_s = logits / T - shift    exp_s = exp(log_s)    sum_s = sum(exp_s)

so that p_s = exp_s / sum_s and log p_s = log_s - log sum_s; normalising is left to factors per row.
Values are sums of p times a log ratio, element by element: a difference of two log-sum-exps would
lose a small divergence in the rounding of two large numbers.

Per divergence there are three steps: `accumulate` takes the sums of a block, `write_gradient` uses
what it left behind, and `values` turns the sums of all rows into divergences at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import JSD, BuiltDivergence, ForwardKL

# Smallest normal float32 is 1.2e-38: added to the mixture of JSD, it keeps log finite where both
# probabilities underflow, and is too small to be seen anywhere else.
TINY = 2.0e-38


class Sums(NamedTuple):
    """Sums over the vocabulary and their logarithms, each (R, 1)."""

    exp_s: Tensor
    exp_t: Tensor
    exp_ce: Tensor  # of exp(student logits) at temperature 1, where that is another softmax
    cross_s: Tensor  # exp_s times a log ratio
    cross_t: Tensor  # exp_t times a log ratio
    log_s: Tensor  # of sum exp_s, as float32 rounded it, where the log ratio was normalised with it
    log_t: Tensor  # of sum exp_t, likewise


@dataclass(slots=True)
class Block:
    """R rows. `log_*` may be the caller's logits and are only read; the rest is scratch, (R, V) each."""

    log_s: Tensor
    log_t: Tensor
    exp_s: Tensor
    exp_t: Tensor
    ratio: Tensor
    spare: Tensor
    sums: Sums
    careful: bool  # entries of probability 0 may come with infinite logarithms: make 0 * inf = 0


def load(logits: Tensor, bias: Tensor | None, careful: bool, scratch: Tensor) -> Tensor:
    """logits + bias, minus the row's maximum if `careful`; `logits` itself where nothing is to be done."""
    loaded = logits if logits.dtype == scratch.dtype else scratch.copy_(logits)
    if bias is not None:
        loaded = torch.add(loaded, bias, out=scratch)
    if careful:
        loaded = torch.sub(loaded, loaded.amax(-1, keepdim=True), out=scratch)
    return loaded


def exponentiate(log: Tensor, exp: Tensor, total: Tensor) -> None:
    """exp = exp(log), total = its row sums."""
    torch.exp(log, out=exp)
    torch.sum(exp, -1, keepdim=True, out=total)


def _weighted_sum(exp: Tensor, log_ratio: Tensor, careful: bool, products: Tensor, total: Tensor) -> None:
    """total = row sums of exp * log_ratio; entries whose exp is 0 count as 0, also in log_ratio."""
    if careful:
        log_ratio.masked_fill_(exp == 0, 0.0)
    torch.sum(torch.mul(exp, log_ratio, out=products), -1, keepdim=True, out=total)


def accumulate(block: Block, divergence: BuiltDivergence) -> None:
    """Exponentials and sums of a block; `ratio` keeps the log ratio that `write_gradient` needs.

    The order matters: both rows of logits are read as long as they are in the cache, and few buffers are touched.
    """
    sums = block.sums
    if isinstance(divergence, ForwardKL):
        # The ratio is not needed again, so it lies where the student's exponentials come to lie.
        torch.sub(block.log_t, block.log_s, out=block.exp_s)
        exponentiate(block.log_t, block.exp_t, sums.exp_t)
        _weighted_sum(block.exp_t, block.exp_s, block.careful, block.exp_s, sums.cross_t)
        exponentiate(block.log_s, block.exp_s, sums.exp_s)
        return
    exponentiate(block.log_s, block.exp_s, sums.exp_s)
    exponentiate(block.log_t, block.exp_t, sums.exp_t)
    if isinstance(divergence, JSD):
        _accumulate_jsd(block, divergence.beta)
    else:
        # Brought near log p first, which is small where p is large: the gradient is as exact as this difference.
        torch.sub(block.log_t, torch.log(sums.exp_t, out=sums.log_t), out=block.spare)
        torch.sub(block.log_s, torch.log(sums.exp_s, out=sums.log_s), out=block.ratio).sub_(block.spare)
        _weighted_sum(block.exp_s, block.ratio, block.careful, block.spare, sums.cross_s)


def _accumulate_jsd(block: Block, beta: float) -> None:
    """Cross sums of log(p_s / m), left in `ratio`, and of log(p_t / m) + log(sum_t / sum_s)."""
    sums = block.sums
    # sum_s * m: the logarithm of exp_s over it is log(p_s / m), without normalising either.
    mixture = torch.add(sums.exp_s.new_full((), TINY), block.exp_s, alpha=1.0 - beta, out=block.spare)
    mixture.addcmul_(block.exp_t, sums.exp_s / sums.exp_t, value=beta)
    if block.careful:
        # Subtracting logarithms is right for probabilities of 0 as well.
        log_mixture = mixture.log_()
        torch.sub(block.log_t, log_mixture, out=block.ratio)
        _weighted_sum(block.exp_t, block.ratio, True, block.ratio, sums.cross_t)
        torch.sub(block.log_s, log_mixture, out=block.ratio)
        _weighted_sum(block.exp_s, block.ratio, True, block.spare, sums.cross_s)
    else:
        # Without a shift log_s may be large just where p_s is large, and its rounding with it. Quotients are
        # near 1 where the student is near its teacher, and with every logarithm taken of the same
        # exponentials, their rounding moves the two distributions and not the distance between them.
        torch.div(block.exp_t, mixture, out=block.ratio).log_()
        _weighted_sum(block.exp_t, block.ratio, False, block.ratio, sums.cross_t)
        student_ratio = torch.div(block.exp_s, mixture, out=block.spare).log_()
        _weighted_sum(block.exp_s, student_ratio, False, block.ratio, sums.cross_s)
        block.ratio, block.spare = block.spare, block.ratio


def values(divergence: BuiltDivergence, stack: Tensor) -> Tensor:
    """D (N, 1) from the sums (len(Sums), N, 1).

    Put together in float64: there are few of these numbers, and they nearly cancel.
    """
    sums = Sums(*stack.double().unbind())
    student, teacher = sums.cross_s / sums.exp_s, sums.cross_t / sums.exp_t
    if isinstance(divergence, ForwardKL):
        value = teacher - (sums.exp_t / sums.exp_s).log()
    elif isinstance(divergence, JSD):
        # The same rounded quotient as in the mixture, so that its rounding drops out of the distance.
        rounded = Sums(*stack.unbind())
        teacher = teacher + (rounded.exp_s / rounded.exp_t).double().log()
        value = divergence.beta * teacher + (1.0 - divergence.beta) * student
    else:
        # What the rounded logarithms in `accumulate` left over.
        value = student - (sums.exp_s.log() - sums.log_s) + (sums.exp_t.log() - sums.log_t)
    return value.to(stack.dtype)


def write_gradient(
    block: Block,
    divergence: BuiltDivergence,
    scale: Tensor,  # (R, 1)
    extra: Tensor | None,  # (R, 1)
    out: Tensor,  # (R, V)
) -> None:
    """out = scale * dD/du_s + extra * p_s with u_s = logits / T; overwrites the block's scratch."""
    sums = block.sums
    factor = scale / sums.exp_s
    offset = None if extra is None else extra / sums.exp_s
    if isinstance(divergence, ForwardKL):
        block.exp_s.mul_(factor if offset is None else factor + offset)
        torch.addcmul(block.exp_s, block.exp_t, scale / sums.exp_t, value=-1.0, out=out)
        return
    if isinstance(divergence, JSD):
        factor.mul_(1.0 - divergence.beta)
    # Subtracted before anything is multiplied: where p_s is near 1 the two are near each other.
    weights = block.ratio.sub_(sums.cross_s / sums.exp_s).mul_(factor)
    if offset is not None:
        weights.add_(offset)
    torch.mul(block.exp_s, weights, out=out)
