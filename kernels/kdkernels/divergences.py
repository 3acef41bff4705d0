"""The divergences a loss can use: small frozen objects, or their names as strings.

`p_t` is the teacher's distribution and `p_s` the student's, both at temperature T.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardKL:
    """KL(p_t ‖ p_s) = sum p_t (log p_t - log p_s): the student has to cover what the teacher does."""


@dataclass(frozen=True)
class ReverseKL:
    """KL(p_s ‖ p_t) = sum p_s (log p_s - log p_t): the student has to stay where the teacher is."""


@dataclass(frozen=True)
class JSD:
    """beta KL(p_t ‖ m) + (1 - beta) KL(p_s ‖ m) with m = beta p_t + (1 - beta) p_s.

    The formula tends to 0 at both ends of beta, it does not become a KL there; use
    `ForwardKL` or `ReverseKL` for those. Default: beta 0.5, the symmetric Jensen-Shannon divergence.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD needs 0 < beta < 1, got {self.beta}; at 0 and 1 the formula is constantly 0, "
                "so use ForwardKL() or ReverseKL() there"
            )


@dataclass(frozen=True)
class SkewKL:
    """KL(p_t ‖ alpha p_t + (1 - alpha) p_s)."""

    alpha: float = 0.1


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(p_s ‖ (1 - alpha) p_t + alpha p_s)."""

    alpha: float = 0.1


@dataclass(frozen=True)
class TVD:
    """Total variation distance, 1/2 sum abs(p_t - p_s)."""


@dataclass(frozen=True)
class AlphaBeta:
    """The alpha-beta divergence of ABKD."""

    alpha: float
    beta: float


@dataclass(frozen=True, eq=False)
class Decoupled:
    """DKD: target * TKD + non_target * NCKD; the weights are numbers or one value per token."""

    target: float | Tensor = 1.0
    non_target: float | Tensor = 1.0


Divergence = ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | TVD | AlphaBeta | Decoupled
BuiltDivergence = ForwardKL | ReverseKL | JSD

NAMES: dict[str, type[ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | TVD]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "tvd": TVD,
}


def resolve_divergence(divergence: str | Divergence) -> BuiltDivergence:
    """The divergence object for a name or an object; refuses unknown names and what is not built yet."""
    if isinstance(divergence, str):
        if divergence not in NAMES:
            raise ValueError(f"divergence must be one of {', '.join(NAMES)} or an object, got {divergence!r}")
        divergence = NAMES[divergence]()
    if isinstance(divergence, ForwardKL | ReverseKL | JSD):
        return divergence
    if isinstance(divergence, SkewKL | SkewReverseKL | TVD | AlphaBeta | Decoupled):
        raise NotImplementedError(
            f"divergence {type(divergence).__name__} is not supported yet; use forward_kl, reverse_kl or jsd"
        )
    raise ValueError(
        f"divergence must be one of {', '.join(NAMES)} or an object such as JSD(0.3), got {divergence!r}"
    )
