"""The divergences a loss can use: small frozen objects, or their names as strings.

`p_t` is the teacher's distribution and `p_s` the student's, both at temperature T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Below this size alpha, beta and their sum have to be exactly 0 in `AlphaBeta`: the formula divides by them a difference
# that is as small as they are, for which float32 has no digits.
LEAST_POWER = 0.01


def _check_plain(name: str, value: object) -> None:
    """No tensor: a divergence's own numbers get no gradient, and are read by the host."""
    if value is None or isinstance(value, Tensor | str):
        raise ValueError(f"{name} must be a plain number, got {type(value).__name__}")


def _check_skew(name: str, alpha: float, plain: str) -> None:
    _check_plain(f"alpha of {name}", alpha)
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"{name} needs 0 < alpha < 1, got {alpha}; at 0 it is {plain}(), at 1 it is constantly 0"
        )


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
        _check_plain("beta of JSD", self.beta)
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD needs 0 < beta < 1, got {self.beta}; at 0 and 1 the formula is constantly 0, "
                "so use ForwardKL() or ReverseKL() there"
            )


@dataclass(frozen=True)
class SkewKL:
    """KL(p_t ‖ alpha p_t + (1 - alpha) p_s): forward KL that stays finite where the student gives nothing.

    0 < alpha < 1, default 0.1. Source: Ko et al., "DistiLLM", 2024, equation 3.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew("SkewKL", self.alpha, "ForwardKL")


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(p_s ‖ (1 - alpha) p_t + alpha p_s): reverse KL that stays finite where the teacher gives nothing.

    0 < alpha < 1, default 0.1. Source: Ko et al., "DistiLLM", 2024, section 3.1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew("SkewReverseKL", self.alpha, "ReverseKL")


@dataclass(frozen=True)
class TVD:
    """Total variation distance, 1/2 sum abs(p_t - p_s); entries at which both agree have slope 0."""


@dataclass(frozen=True)
class AlphaBeta:
    """The alpha-beta divergence, its limits included; `alpha` is the power of the teacher, `beta` of the student.

        -1 / (alpha beta) sum [p_t^alpha p_s^beta - alpha / (alpha + beta) p_t^(alpha + beta)
                               - beta / (alpha + beta) p_s^(alpha + beta)]

    (1, 0) is forward KL, (0, 1) reverse KL, (0.5, 0.5) four times the squared Hellinger distance. alpha, beta and
    alpha + beta are each 0 or at least 0.01 in size: between, the formula is a rounding error divided by a small number.
    Entries at which both probabilities are 0 count as 0. With a power below 0, or a sum of powers that is not above
    0, an entry that only one side excludes makes the divergence infinite.

    Source: Cichocki, Cruces and Amari, 2011, equations 19 to 22; Wang et al., "ABKD", 2025, section 3.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        _check_plain("alpha of AlphaBeta", self.alpha)
        _check_plain("beta of AlphaBeta", self.beta)
        for name, power in (
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("alpha + beta", self.alpha + self.beta),
        ):
            if not math.isfinite(power) or 0.0 < abs(power) < LEAST_POWER:
                raise ValueError(
                    f"AlphaBeta needs {name} to be 0 or at least {LEAST_POWER} in size, got {power}; "
                    "0 gives the limit, which is close"
                )


@dataclass(frozen=True, eq=False)
class Decoupled:
    """DKD: target * TKD + non_target * NCKD, both at temperature T; needs labels.

    TKD is KL(teacher ‖ student) of the two-way distributions (label, all the rest), NCKD that of the distributions
    over the rest alone, so forward KL is TKD + (1 - p_t[label]) * NCKD. The weights are numbers or tensors with
    one value per token, without gradient. Defaults 1.0.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, equation 7; per-token weights: Zhong et al.,
    "Revisiting Knowledge Distillation for Autoregressive Language Models" (ATKD), 2024.
    """

    target: float | Tensor = 1.0
    non_target: float | Tensor = 1.0


Divergence = ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | TVD | AlphaBeta | Decoupled

NAMES: dict[str, type[ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | TVD]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "tvd": TVD,
}


def resolve_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence object for a name or an object; refuses unknown names."""
    if isinstance(divergence, str) and divergence in NAMES:
        return NAMES[divergence]()
    if isinstance(divergence, Divergence):
        return divergence
    raise ValueError(
        f"divergence must be one of {', '.join(NAMES)} or an object such as JSD(0.3), got {divergence!r}"
    )
