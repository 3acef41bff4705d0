"""Divergences of powers: alpha-beta with its limits, Rényi's.

Of alpha-beta, with P = p_t^alpha p_s^beta and Q = p_s^(alpha + beta) the gradient is p_s f - p_s <f> where p_s f = (Q - P) / alpha, also at
beta = 0 and alpha + beta = 0; at alpha = 0 it is p_s f = Q (log p_s - log p_t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import AlphaBeta, Renyi
from .blocks import Block, Sums


class AlphaBetaArithmetic:
    """first and second are the sums of `ratio` (P, at alpha = 0 p_s f) and of `work` (Q), unnormalised.

    third is what else the value needs: alpha beta times the value itself; at beta = 0 sum exp_t^alpha (log_t - log_s); at
    alpha = 0 sum exp_t^beta; at alpha + beta = 0 sum (log_s - log_t); with both 0 sum (log p_s - log p_t)^2.
    """

    def __init__(self, divergence: AlphaBeta, dtype: torch.dtype) -> None:
        # The exponents as they are multiplied with, so that they add up: an exponent that is off by a rounding in one of
        # the sums would be a constant error of all values.
        self.alpha, self.both = (
            torch.tensor(power, dtype=dtype).item()
            for power in (divergence.alpha, divergence.alpha + divergence.beta)
        )
        self.beta = self.both - self.alpha
        self.general = 0.0 not in (self.alpha, self.beta, self.both)

    def accumulate(self, block: Block) -> None:
        sums, alpha, beta, both = block.sums, self.alpha, self.beta, self.both
        block.exponentiate_student()
        block.exponentiate_teacher()
        neither = None
        if block.safe:
            neither = (block.log_s == -torch.inf).logical_and_(block.log_t == -torch.inf)

        if both != 0.0:
            torch.mul(block.log_s, both, out=block.work).exp_()
        else:
            block.work.fill_(1.0)
        if alpha != 0.0:
            torch.mul(block.log_t, alpha, out=block.ratio)
            if beta != 0.0:
                block.ratio.add_(block.log_s, alpha=beta)
            block.ratio.exp_()
        else:
            # The logs have to be normalised here: a difference takes no factor.
            gap = torch.log(sums.exp_t, out=sums.log_t) - torch.log(sums.exp_s, out=sums.log_s)
            torch.sub(block.log_s, block.log_t, out=block.ratio).add_(gap)
            if neither is not None:
                block.ratio.masked_fill_(neither, 0.0)
                if beta != 0.0:
                    block.ratio.masked_fill_(block.work == 0, 0.0)
            if beta != 0.0:
                block.ratio.mul_(block.work)
        if neither is not None:
            block.work.masked_fill_(neither, 0.0)
            block.ratio.masked_fill_(neither, 0.0)
        self._third(block, neither)
        if not self.general or not block.whole:
            torch.sum(block.ratio, -1, keepdim=True, out=sums.first)
            torch.sum(block.work, -1, keepdim=True, out=sums.second)

    def _third(self, block: Block, neither: Tensor | None) -> None:
        """Uses `exp_t`, which nothing needs after its sum is known."""
        scratch, total = block.exp_t, block.sums.third
        if self.alpha == 0.0 and self.beta == 0.0:
            torch.mul(block.ratio, block.ratio, out=scratch)
        elif self.both == 0.0:
            torch.sub(block.log_s, block.log_t, out=scratch)
        elif self.beta == 0.0:
            torch.sub(block.log_t, block.log_s, out=scratch)
            if block.safe:
                scratch.masked_fill_(block.ratio == 0, 0.0)
            scratch.mul_(block.ratio)
        else:
            torch.mul(block.log_t, self.both, out=scratch).exp_()
        if neither is not None:
            scratch.masked_fill_(neither, 0.0)
        if self.general:
            total.copy_(self._general(block, scratch))
        else:
            torch.sum(scratch, -1, keepdim=True, out=total)

    def _general(self, block: Block, teacher: Tensor) -> Tensor:
        """alpha beta times the value, (R, 1) in float64: three sums near 1 of which next to nothing may be left."""
        student, product, teacher = (
            torch.sum(powers, -1, keepdim=True).double() for powers in (block.work, block.ratio, teacher)
        )
        sums = Sums(*(number.double() for number in block.sums))
        of_product, of_q = self._factors(sums)
        ends = self.alpha * teacher * sums.exp_t.pow(-self.both) + self.beta * student * of_q
        return ends / self.both - product * of_product

    def _factors(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """What normalises `ratio` and `work`, (R, 1) each."""
        of_q = sums.exp_s.pow(-self.both)
        return (of_q if self.alpha == 0.0 else sums.exp_t.pow(-self.alpha) * sums.exp_s.pow(-self.beta)), of_q

    def mean(self, sums: Sums) -> Tensor:
        of_ratio, of_q = self._factors(sums)
        if self.alpha == 0.0:
            return sums.first * of_ratio
        return (sums.second * of_q - sums.first * of_ratio) / self.alpha

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        alpha, beta, both = self.alpha, self.beta, self.both
        if self.general:
            return sums.third / (alpha * beta)
        of_ratio, of_q = self._factors(sums)
        ratio, student = sums.first * of_ratio, sums.second * of_q
        gap = sums.exp_s.log() - sums.exp_t.log()
        if alpha == 0.0 and beta == 0.0:
            return 0.5 * sums.third
        if both == 0.0:
            return (alpha * (sums.third - sums.second * gap) + ratio - sums.second) / alpha**2
        if beta == 0.0:
            return (alpha * (sums.third * of_ratio + ratio * gap) - ratio + student) / alpha**2
        return (beta * ratio - student + sums.third * sums.exp_t.pow(-both)) / beta**2

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        sums = block.sums
        of_ratio, of_q = self._factors(sums)
        if self.alpha == 0.0:
            block.ratio.mul_(scale * of_ratio)
        else:
            block.ratio.mul_(-scale * of_ratio / self.alpha).addcmul_(block.work, scale * of_q / self.alpha)
        # A sum of the very numbers it is subtracted from: where p_s is near 1 their rounding drops out.
        mean = torch.sum(block.ratio, -1, keepdim=True) if block.mean is None else scale * block.mean
        own = -mean if extra is None else extra - mean
        torch.addcmul(block.ratio, block.exp_s, own / sums.exp_s, out=out)


class RenyiArithmetic:
    """log(sum p_t^alpha p_s^(1 - alpha)) / (alpha - 1); `ratio` is the product, over exp(second): its largest entry is 1.

    first is the sum of `ratio`. The logs are normalised before they are multiplied: what is large in a product is then
    as exact as in the two distributions.
    """

    def __init__(self, divergence: Renyi, dtype: torch.dtype) -> None:
        self.alpha = divergence.alpha

    def accumulate(self, block: Block) -> None:
        block.exponentiate_student()
        block.exponentiate_teacher()
        sums, alpha = block.sums, self.alpha
        torch.sub(block.log_t, torch.log(sums.exp_t, out=sums.log_t), out=block.ratio).mul_(alpha)
        torch.sub(block.log_s, torch.log(sums.exp_s, out=sums.log_s), out=block.work)
        log_product = block.ratio.add_(block.work, alpha=1.0 - alpha)
        if block.safe:
            log_product.masked_fill_(block.log_t == -torch.inf, -torch.inf)
        torch.amax(log_product, -1, keepdim=True, out=sums.second)
        sums.second.masked_fill_(sums.second.abs() == torch.inf, 0.0)
        torch.exp(log_product.sub_(sums.second), out=log_product)
        torch.sum(log_product, -1, keepdim=True, out=sums.first)

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        # The remainder of the rounded logarithms in `accumulate`.
        teacher, student = sums.log_t - sums.exp_t.log(), sums.log_s - sums.exp_s.log()
        left_over = self.alpha * teacher + (1.0 - self.alpha) * student
        return (sums.first.log() + sums.second + left_over) / (self.alpha - 1.0)

    def mean(self, sums: Sums) -> Tensor:
        return torch.zeros_like(sums.first)

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        sums = block.sums
        block.exp_s.mul_((scale if extra is None else scale + extra) / sums.exp_s)
        torch.addcmul(block.exp_s, block.ratio, scale / sums.first, value=-1.0, out=out)
