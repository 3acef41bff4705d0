"""What a divergence has to be able to do on a block of rows; and forward KL, the plainest of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..divergences import ForwardKL
from .blocks import Block, Sums, weighted_sum


class Arithmetic(Protocol):
    """Sums and gradient of one divergence, over blocks with all columns or some of them (`Block.whole`)."""

    def accumulate(self, block: Block) -> None:
        """Exponentials and sums of a block; leaves in its scratch what `write_gradient` needs.

        Its order matters: both rows of logits are read as long as they are in the cache, and few buffers are touched.
        """
        ...

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        """D (N, 1) from the sums in float64, where they nearly cancel; `rounded` are the same as they were taken."""
        ...

    def mean(self, sums: Sums) -> Tensor:
        """Mean slope <f>, (R, 1); for a vocabulary tile the contribution of the tile. 0 if the gradient needs none."""
        ...

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        """out (R, V) = scale (R, 1) * dD/du_s + extra (R, 1) * p_s with u_s = logits / T; overwrites the scratch."""
        ...


class ForwardKLArithmetic:
    """sum p_t (log p_t - log p_s); first is sum exp_t (log_t - log_s)."""

    def __init__(self, divergence: ForwardKL, dtype: torch.dtype) -> None:
        pass

    def accumulate(self, block: Block) -> None:
        sums = block.sums
        # The ratio is not needed again, so it is kept where the student's exponentials will be.
        torch.sub(block.log_t, block.log_s, out=block.exp_s)
        block.exponentiate_teacher()
        weighted_sum(block.exp_t, block.exp_s, block.safe, block.exp_s, sums.first)
        block.exponentiate_student()

    def values(self, sums: Sums, rounded: Sums) -> Tensor:
        return sums.first / sums.exp_t - (sums.exp_t / sums.exp_s).log()

    def mean(self, sums: Sums) -> Tensor:
        return torch.zeros_like(sums.first)

    def write_gradient(self, block: Block, scale: Tensor, extra: Tensor | None, out: Tensor) -> None:
        sums = block.sums
        block.exp_s.mul_((scale if extra is None else scale + extra) / sums.exp_s)
        torch.addcmul(block.exp_s, block.exp_t, scale / sums.exp_t, value=-1.0, out=out)
