"""Which arithmetic belongs to which divergence. A new divergence is one class and one line here."""

from __future__ import annotations

from typing import Any

import torch

from ..divergences import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    Divergence,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from .arithmetic import Arithmetic, ForwardKLArithmetic
from .label_split import DecoupledArithmetic
from .means import (
    ChiSquaredArithmetic,
    JSDArithmetic,
    ReverseKLArithmetic,
    SkewArithmetic,
    SkewReverseArithmetic,
    TVDArithmetic,
)
from .powers import AlphaBetaArithmetic, RenyiArithmetic

ARITHMETIC: dict[type[Divergence], Any] = {
    ForwardKL: ForwardKLArithmetic,
    ReverseKL: ReverseKLArithmetic,
    JSD: JSDArithmetic,
    SkewKL: SkewArithmetic,
    SkewReverseKL: SkewReverseArithmetic,
    TVD: TVDArithmetic,
    AlphaBeta: AlphaBetaArithmetic,
    ChiSquared: ChiSquaredArithmetic,
    Renyi: RenyiArithmetic,
    Decoupled: DecoupledArithmetic,
}


def arithmetic_of(divergence: Divergence, dtype: torch.dtype) -> Arithmetic:
    """The arithmetic of a divergence with its numbers in it; `dtype` is what is computed in."""
    if type(divergence) not in ARITHMETIC:
        raise NotImplementedError(f"the torch back end has no arithmetic for {divergence!r}")
    return ARITHMETIC[type(divergence)](divergence, dtype)
