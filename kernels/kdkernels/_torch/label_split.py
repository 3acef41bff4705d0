"""The decoupled divergence: the label's entry against the others, and the others among themselves.

Sums are over the others only, and the label's log-probability is kept as a logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.labels import BinaryKL
from ..divergences import Decoupled
from .blocks import Block, Sums, shift, weighted_sum


def _binary(sums: Sums) -> BinaryKL:
    return BinaryKL(sums.label_s, sums.exp_s, sums.label_t, sums.exp_t)


class DecoupledArithmetic:
    """target * TKD + non_target * NCKD; exp_s, exp_t are sums over the others, first is sum exp_t (log_t - log_s)."""

    def __init__(self, divergence: Decoupled, dtype: torch.dtype) -> None:
        pass

    def accumulate(self, block: Block) -> None:
        sums = block.sums
        if block.labels is not None:
            self._split(block, block.labels)
        torch.sub(block.log_t, block.log_s, out=block.ratio)
        for log, exp, total in (
            (block.log_t, block.exp_t, sums.exp_t),
            (block.log_s, block.exp_s, sums.exp_s),
        ):
            torch.exp(log, out=exp)
            if block.labels is not None and not block.safe:
                kept = 0.0 if block.absent is None else exp.gather(1, block.labels).mul_(block.absent)
                exp.scatter_(1, block.labels, kept)
            if block.whole:
                torch.sum(exp, -1, keepdim=True, out=total)
        weighted_sum(block.exp_t, block.ratio, block.safe, block.ratio, sums.first)

    def _split(self, block: Block, labels: Tensor) -> None:
        """Keep the label's logs; where there are shifted copies, take its entries out and shift to the others' maximum."""
        for log, label in ((block.log_s, block.sums.label_s), (block.log_t, block.sums.label_t)):
            own = torch.gather(log, 1, labels)
            gone = torch.full_like(own, -torch.inf)
            label.copy_(own if block.absent is None else own.where(~block.absent, gone))
            if block.safe:
                log.scatter_(1, labels, gone if block.absent is None else own.where(block.absent, gone))
                before = log.amax(-1, keepdim=True)
                shift(log, log)
                label.sub_(before.masked_fill_(before == -torch.inf, 0.0))

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        # Of a teacher that gives the others nothing, they have no distribution: that part is 0.
        others = sums.first / sums.exp_t - (sums.exp_t / sums.exp_s).log()
        return sums.target * _binary(sums).divergence() + sums.non_target * others.masked_fill(
            sums.exp_t == 0, 0.0
        )

    def mean(self, sums: Sums) -> Tensor:
        return torch.zeros_like(sums.first)

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        assert extra is None, "p_s is no multiple of exp_s / sum exp_s here"
        sums, gap = block.sums, _binary(block.sums).target_difference().to(scale.dtype)
        non_target = sums.non_target.masked_fill(sums.exp_t == 0, 0.0)  # as the value
        student = (scale * (sums.target * gap + non_target) / sums.exp_s).masked_fill_(sums.exp_s == 0, 0.0)
        teacher = (scale * non_target / sums.exp_t).masked_fill_(sums.exp_t == 0, 0.0)
        block.exp_s.mul_(student)
        torch.addcmul(block.exp_s, block.exp_t, teacher, value=-1.0, out=out)
        if block.labels is None:
            return
        own = -scale * sums.target * gap
        if block.absent is not None:
            own = torch.where(block.absent, out.gather(1, block.labels), own)
        out.scatter_(1, block.labels, own)
