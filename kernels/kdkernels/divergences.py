"""The divergences a loss can use: small frozen objects, or their names as strings.

`p_t` is the teacher's distribution and `p_s` the student's, both at temperature T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Below this size alpha, beta and their sum have to be exactly 0 in `AlphaBeta`: the formula divides by them a difference
# that is as small as they are, for which float32 has no digits.
MIN_POWER = 0.01


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
class Properties:
    """What schedules, top-k teachers and checks ask of a divergence.

    Every default is the answer that promises least, so that a new divergence is refused where it says nothing.
    """

    needs_mean: bool = True
    """The gradient is p_s (f - <f>) with <f> = sum p_s f: the whole row is read before its gradient is written."""

    adds_over_tiles: bool = False
    """Value and mean are sums over the entries, so those of tiles of the vocabulary can be added up."""

    is_linear_without_teacher: bool = False
    """Where p_t = 0 a term is a constant times p_s, so all entries that a top-k teacher left out count as one."""

    may_be_infinite: bool = True
    """There are two distributions for which the value is infinite."""


class Divergence:
    """The base of all divergences."""

    @property
    def properties(self) -> Properties:
        """What the divergence promises; nothing, unless it says so."""
        return Properties()


_BOUNDED = Properties(adds_over_tiles=True, is_linear_without_teacher=True, may_be_infinite=False)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p_t ‖ p_s) = sum p_t (log p_t - log p_s): the student has to cover what the teacher does."""

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return Properties(needs_mean=False, adds_over_tiles=True, is_linear_without_teacher=True)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p_s ‖ p_t) = sum p_s (log p_s - log p_t): the student has to stay where the teacher is."""

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return Properties(adds_over_tiles=True)


@dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(p_t ‖ m) + (1 - beta) KL(p_s ‖ m) with m = beta p_t + (1 - beta) p_s.

    The formula tends to 0 at both ends of beta, it does not become a KL there; use
    `ForwardKL` or `ReverseKL` for those. Default: beta 0.5, the symmetric Jensen-Shannon divergence.
    """

    beta: float = 0.5

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return _BOUNDED

    def __post_init__(self) -> None:
        _check_plain("beta of JSD", self.beta)
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD needs 0 < beta < 1, got {self.beta}; at 0 and 1 the formula is constantly 0, "
                "so use ForwardKL() or ReverseKL() there"
            )


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p_t ‖ alpha p_t + (1 - alpha) p_s): forward KL that stays finite where the student gives nothing.

    0 < alpha < 1, default 0.1. Source: Ko et al., "DistiLLM", 2024, equation 3.
    """

    alpha: float = 0.1

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return _BOUNDED

    def __post_init__(self) -> None:
        _check_skew("SkewKL", self.alpha, "ForwardKL")


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p_s ‖ (1 - alpha) p_t + alpha p_s): reverse KL that stays finite where the teacher gives nothing.

    0 < alpha < 1, default 0.1. Source: Ko et al., "DistiLLM", 2024, section 3.1.
    """

    alpha: float = 0.1

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return _BOUNDED

    def __post_init__(self) -> None:
        _check_skew("SkewReverseKL", self.alpha, "ReverseKL")


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance, 1/2 sum abs(p_t - p_s); entries at which both agree have slope 0."""

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return _BOUNDED


@dataclass(frozen=True)
class AlphaBeta(Divergence):
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

    @property
    def properties(self) -> Properties:
        """See `Properties`. Where p_t = 0 the terms are p_s^(alpha + beta) / (alpha (alpha + beta))."""
        return Properties(
            adds_over_tiles=True,
            is_linear_without_teacher=self.alpha > 0.0 and self.alpha + self.beta == 1.0,
            may_be_infinite=min(self.alpha, self.beta) <= 0.0,
        )

    def __post_init__(self) -> None:
        _check_plain("alpha of AlphaBeta", self.alpha)
        _check_plain("beta of AlphaBeta", self.beta)
        for name, power in (
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("alpha + beta", self.alpha + self.beta),
        ):
            if not math.isfinite(power) or 0.0 < abs(power) < MIN_POWER:
                raise ValueError(
                    f"AlphaBeta needs {name} to be 0 or at least {MIN_POWER} in size, got {power}; "
                    "0 gives the limit, which is close"
                )


@dataclass(frozen=True, eq=False)
class Decoupled(Divergence):
    """DKD: target * TKD + non_target * NCKD, both at temperature T; needs labels.

    TKD is KL(teacher ‖ student) of the two-way distributions (label, all the rest), NCKD that of the distributions
    over the rest alone, so forward KL is TKD + (1 - p_t[label]) * NCKD. The weights are numbers or tensors with
    one value per token, without gradient. Defaults 1.0.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, equation 7; per-token weights: Zhong et al.,
    "Revisiting Knowledge Distillation for Autoregressive Language Models" (ATKD), 2024.
    """

    target: float | Tensor = 1.0
    non_target: float | Tensor = 1.0

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return Properties(needs_mean=False, adds_over_tiles=True)


@dataclass(frozen=True)
class ChiSquared(Divergence):
    """Pearson's chi-squared distance, sum (p_t - p_s)^2 / p_s: a student that misses an entry pays without bound.

    It is 2 AlphaBeta(2, -1). Where p_t / p_s of an entry is beyond float32 (exp(88)), so is the value: it is infinite.

    Source: Nielsen and Nock, "On the chi square and higher-order chi distances for approximating f-divergences", 2014.
    """

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return Properties(adds_over_tiles=True, is_linear_without_teacher=True)


@dataclass(frozen=True)
class Renyi(Divergence):
    """Rényi's divergence, log(sum p_t^alpha p_s^(1 - alpha)) / (alpha - 1); alpha above 0 and not 1.

    Its gradient is p_s - w, where w is p_t^alpha p_s^(1 - alpha) made to sum to 1: forward KL, from a teacher that is moved
    towards the student (alpha below 1) or away from it. At least 0.01 away from 0 and from 1, where it is forward KL.

    Source: Rényi, "On measures of entropy and information", 1961; van Erven and Harremoës, "Rényi divergence and
    Kullback-Leibler divergence", 2014, equation 1.
    """

    alpha: float

    @property
    def properties(self) -> Properties:
        """See `Properties`."""
        return Properties(needs_mean=True, is_linear_without_teacher=True)

    def __post_init__(self) -> None:
        _check_plain("alpha of Renyi", self.alpha)
        if not math.isfinite(self.alpha) or self.alpha < MIN_POWER or abs(self.alpha - 1.0) < MIN_POWER:
            raise ValueError(
                f"Renyi needs alpha at or above {MIN_POWER} and at least {MIN_POWER} away from 1, "
                f"got {self.alpha}; at 1 it is ForwardKL()"
            )


NAMES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "tvd": TVD,
    "chi_squared": ChiSquared,
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
