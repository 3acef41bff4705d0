"""Divergences with the gradient p_s (f - <f>) where f is one number per entry: reverse KL, JSD, the skews, TVD, chi-squared.

`accumulate` leaves f in `ratio`, up to a constant of its row, and exp_s f in `work`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import JSD, TVD, ChiSquared, ReverseKL, SkewKL, SkewReverseKL
from .blocks import Block, Sums, weighted_sum

# Smallest normal float32 is 1.2e-38: added to a mixture, it keeps quotients and logarithms finite where both
# probabilities underflow, and is too small to be seen anywhere else.
TINY = 2.0e-38


def mixture(block: Block, student_share: float) -> Tensor:
    """sum_s * m with m = share p_s + (1 - share) p_t, in `work`: exp_s over it is p_s / m."""
    sums = block.sums
    mixed = torch.add(sums.exp_s.new_full((), TINY), block.exp_s, alpha=student_share, out=block.work)
    return mixed.addcmul_(block.exp_t, sums.exp_s / sums.exp_t, value=1.0 - student_share)


class MeanArithmetic:
    """The gradient factor * p_s (f - <f>)."""

    factor = 1.0

    def mean(self, sums: Sums) -> Tensor:
        """<f> (R, 1)."""
        return sums.first / sums.exp_s

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        # exp_s f is there from its sum: two passes, where exp_s (f - <f>) takes three.
        scale = scale * self.factor
        own = -scale * self._mean(block)
        if extra is not None:
            own = own + extra
        torch.mul(block.work, scale / block.sums.exp_s, out=out)
        out.addcmul_(block.exp_s, own / block.sums.exp_s)

    def _mean(self, block: Block) -> Tensor:
        return self.mean(block.sums) if block.mean is None else block.mean

    def _exponentiate(self, block: Block) -> None:
        block.exponentiate_student()
        block.exponentiate_teacher()


class ReverseKLArithmetic(MeanArithmetic):
    """sum p_s (log p_s - log p_t); f is the log ratio, first its sum weighted with exp_s."""

    def __init__(self, divergence: ReverseKL, dtype: torch.dtype) -> None:
        pass

    def accumulate(self, block: Block) -> None:
        self._exponentiate(block)
        sums = block.sums
        # Brought near log p first, which is small where p is large: the gradient is as exact as this difference.
        torch.sub(block.log_t, torch.log(sums.exp_t, out=sums.log_t), out=block.work)
        torch.sub(block.log_s, torch.log(sums.exp_s, out=sums.log_s), out=block.ratio).sub_(block.work)
        weighted_sum(block.exp_s, block.ratio, block.safe, block.work, sums.first)

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        # The remainder of the rounded logarithms in `accumulate`.
        left_over = (sums.exp_t.log() - sums.log_t) - (sums.exp_s.log() - sums.log_s)
        return sums.first / sums.exp_s + left_over


class JSDArithmetic(MeanArithmetic):
    """beta KL(p_t, m) + (1 - beta) KL(p_s, m); f is log(p_s / m).

    first is sum exp_s log(p_s / m), second sum exp_t (log(p_t / m) + log(sum_t / sum_s)).
    """

    def __init__(self, divergence: JSD, dtype: torch.dtype) -> None:
        self.beta = divergence.beta
        self.factor = 1.0 - divergence.beta

    def accumulate(self, block: Block) -> None:
        self._exponentiate(block)
        sums = block.sums
        mixed = mixture(block, 1.0 - self.beta)
        if block.safe:
            # Subtracting logarithms is right for probabilities of 0 as well.
            log_mixed = mixed.log_()
            torch.sub(block.log_t, log_mixed, out=block.ratio)
            weighted_sum(block.exp_t, block.ratio, True, block.ratio, sums.second)
            torch.sub(block.log_s, log_mixed, out=block.ratio)
            weighted_sum(block.exp_s, block.ratio, True, block.work, sums.first)
        else:
            # Without a shift log_s may be large just where p_s is large, and its rounding with it. Quotients are
            # near 1 where the student is near its teacher, and with every logarithm taken of the same
            # exponentials, their rounding moves the two distributions and not the distance between them.
            torch.div(block.exp_t, mixed, out=block.ratio).log_()
            weighted_sum(block.exp_t, block.ratio, False, block.ratio, sums.second)
            student_ratio = torch.div(block.exp_s, mixed, out=block.work).log_()
            weighted_sum(block.exp_s, student_ratio, False, block.ratio, sums.first)
            block.ratio, block.work = block.work, block.ratio

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        # The same rounded quotient as in the mixture, so that its rounding drops out of the distance.
        teacher = sums.second / sums.exp_t + (rounded.exp_s / rounded.exp_t).double().log()
        return self.beta * teacher + (1.0 - self.beta) * sums.first / sums.exp_s


class SkewArithmetic(MeanArithmetic):
    """KL(p_t, m) with m = alpha p_t + (1 - alpha) p_s; f is exp_t / (sum_s m), which is p_t / m up to a factor of the row.

    first is sum exp_s f, second sum exp_t log f.
    """

    def __init__(self, divergence: SkewKL, dtype: torch.dtype) -> None:
        self.alpha = divergence.alpha

    def accumulate(self, block: Block) -> None:
        self._exponentiate(block)
        sums = block.sums
        mixed = mixture(block, 1.0 - self.alpha)
        torch.div(block.exp_t, mixed, out=block.ratio)
        weighted_sum(block.exp_t, torch.log(block.ratio, out=block.work), block.safe, block.work, sums.second)
        torch.sum(torch.mul(block.exp_s, block.ratio, out=block.work), -1, keepdim=True, out=sums.first)

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        return sums.second / sums.exp_t + (rounded.exp_s / rounded.exp_t).double().log()

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        # dD/dp_s = -(1 - alpha) p_t / m, and p_t / m is f sum_s / sum_t.
        factor = (self.alpha - 1.0) * (block.sums.exp_s / block.sums.exp_t)
        super().write_gradient(block, scale * factor, extra, out)


class SkewReverseArithmetic(MeanArithmetic):
    """KL(p_s, m) with m = (1 - alpha) p_t + alpha p_s; f is log(p_s / m) - alpha p_s / m.

    first is sum exp_s f, second sum exp_s log(p_s / m).
    """

    def __init__(self, divergence: SkewReverseKL, dtype: torch.dtype) -> None:
        self.alpha = divergence.alpha

    def accumulate(self, block: Block) -> None:
        self._exponentiate(block)
        sums = block.sums
        quotient = torch.div(block.exp_s, mixture(block, self.alpha), out=block.work)
        torch.log(quotient, out=block.ratio)
        weighted_sum(block.exp_s, block.ratio, block.safe, block.exp_t, sums.second)
        block.ratio.sub_(quotient, alpha=self.alpha)
        torch.sum(torch.mul(block.exp_s, block.ratio, out=block.work), -1, keepdim=True, out=sums.first)

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        return sums.second / sums.exp_s


class TVDArithmetic(MeanArithmetic):
    """1/2 sum |p_s - p_t|; f is the sign of the difference, first its sum weighted with exp_s.

    second is sum |exp_s - exp_t sum_s / sum_t|.
    """

    factor = 0.5

    def __init__(self, divergence: TVD, dtype: torch.dtype) -> None:
        pass

    def accumulate(self, block: Block) -> None:
        self._exponentiate(block)
        sums = block.sums
        torch.addcmul(block.exp_s, block.exp_t, sums.exp_s / sums.exp_t, value=-1.0, out=block.work)
        torch.sign(block.work, out=block.ratio)
        torch.sum(block.work.mul_(block.ratio), -1, keepdim=True, out=sums.second)
        torch.sum(torch.mul(block.exp_s, block.ratio, out=block.work), -1, keepdim=True, out=sums.first)

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        return 0.5 * sums.second / sums.exp_s

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        # f is 1 or -1, and <f> may be near it: subtracted before anything is multiplied.
        weights = block.ratio.sub_(self._mean(block)).mul_(scale * self.factor / block.sums.exp_s)
        if extra is not None:
            weights.add_(extra / block.sums.exp_s)
        torch.mul(block.exp_s, weights, out=out)


class ChiSquaredArithmetic(MeanArithmetic):
    """sum (p_t - p_s) (p_t / p_s - 1); f is 1 - (p_t / p_s)^2, first is sum exp_s f.

    second is sum (exp_t sum_s / sum_t - exp_s) (p_t / p_s - 1).
    """

    def __init__(self, divergence: ChiSquared, dtype: torch.dtype) -> None:
        pass

    def accumulate(self, block: Block) -> None:
        self._exponentiate(block)
        sums = block.sums
        factor = sums.exp_s / sums.exp_t
        # The quotient from the logs, which keep it where both probabilities underflow.
        torch.sub(block.log_t, block.log_s, out=block.ratio).add_(factor.log()).expm1_()
        difference = torch.mul(block.exp_t, factor, out=block.work).sub_(block.exp_s)
        if block.safe:
            block.ratio.masked_fill_(difference == 0, 0.0)
        block.ratio.mul_(difference)
        torch.sum(block.ratio, -1, keepdim=True, out=sums.second)
        difference.mul_(2.0).add_(block.ratio).neg_()
        torch.sum(difference, -1, keepdim=True, out=sums.first)

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        return sums.second / sums.exp_s
