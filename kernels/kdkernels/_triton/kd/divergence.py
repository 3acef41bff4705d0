"""The divergences of the row kernels: a new one is a name, its terms, and nothing elsewhere in this back end.

With r = log(p_s / p_t) and f = dD/dp_s, `divergence_terms` gives for every column a term of the value and its part of
dD/d(student logit / T) = p_s f - p_s <f>, <f> = sum p_s f; constants of f drop out.
Forward KL and the decoupled divergence need no <f>. Reverse KL sums it up online, while the normalisers are not known yet
(`ratio_step`). The mixtures need both normalisers first, so a pass of their own, and alpha-beta goes with them.

Log-ratios come from the difference of the shifted logits, which is exact where the rows agree, and probabilities from
products: neither goes through a rounded logarithm of a probability.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...divergences import (
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
from ..numeric import LN_2, LOG2_E, join_lanes, softmax_step, times_unless_zero

# Of alpha-beta <f> could be summed up online, but it is subtracted from terms of the last pass: only a sum of the same terms
# drops out to its last digit in a row with nearly everything in one entry.
NEEDS_MEAN_PASS = frozenset(
    {"jsd", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "chi_squared", "renyi"}
)


class KernelDivergence(NamedTuple):
    """What a kernel knows of a divergence: its code, and its numbers."""

    name: str
    first: float = 0.0  # share of the teacher in the mixture, or alpha
    second: float = 0.0  # beta of the alpha-beta divergence


class Ratios(NamedTuple):
    """Both distributions of one tile, and the logarithms that the divergences are made of."""

    p_student: Any
    p_teacher: Any
    log_ratio: Any  # log2(p_student / p_teacher)
    log_student: Any  # log2(p_student), where it is used
    log_teacher: Any


def kernel_divergence(divergence: Divergence) -> KernelDivergence:
    """The kernel of a divergence; the corners of the alpha-beta family that have exact kernels get those."""
    match divergence:
        case ForwardKL() | AlphaBeta(1.0, 0.0):
            return KernelDivergence("forward_kl")
        case ReverseKL() | AlphaBeta(0.0, 1.0):
            return KernelDivergence("reverse_kl")
        case JSD(beta):
            return KernelDivergence("jsd", beta)
        case SkewKL(alpha):
            return KernelDivergence("skew_kl", alpha)
        case SkewReverseKL(alpha):
            return KernelDivergence("skew_reverse_kl", 1.0 - alpha)
        case TVD():
            return KernelDivergence("tvd")
        case AlphaBeta(alpha, beta):
            return KernelDivergence("alpha_beta", alpha, beta)
        case Decoupled():
            return KernelDivergence("decoupled")
        case ChiSquared():
            return KernelDivergence("chi_squared")
        case Renyi(alpha):
            return KernelDivergence("renyi", alpha, 1.0 - alpha)
        case _:
            raise NotImplementedError(
                f"the triton back end has no terms for {divergence!r}; use impl='torch'"
            )


@triton.jit
def _exponential_rest(x):
    """exp(x) - 1 - x by its series, for abs(x) < 1/2."""
    series = x * (1.0 / 5040.0) + 1.0 / 720.0
    series = x * (x * (x * series + 1.0 / 120.0) + 1.0 / 24.0) + 1.0 / 6.0
    return x * x * (x * series + 0.5)


@triton.jit
def kl_terms(p, q, log_ratio):
    """p log(p/q) - p + q, whose sum over a row is KL(p || q), and q - p; log_ratio is log(q/p).

    The terms are >= 0 and vanish twice where p = q, so an error of the normalisers enters them squared. Near p = q a
    series keeps the digits that log(p/q) and q - p would lose: a divergence of 1e-9 is as exact as one of 1.
    """
    rest = p * _exponential_rest(log_ratio)
    near = tl.abs(log_ratio) < 0.5
    difference = tl.where(near, p * log_ratio + rest, q - p)
    return tl.where(near, rest, difference - times_unless_zero(p, log_ratio)), difference


@triton.jit
def _mixture(log_ratio, share):
    """The smaller of p_s and p_t, and m = share p_t + (1 - share) p_s, both over the larger of the two.

    A number between the larger's weight and 1, which neither overflows nor vanishes, and keeps its digits where the rows
    agree.
    """
    smaller = tl.exp2(-tl.abs(log_ratio))
    mixture = tl.where(log_ratio < 0.0, share + (1.0 - share) * smaller, (1.0 - share) + share * smaller)
    return smaller, mixture


@triton.jit
def _mixture_logs(log_ratio, mixture):
    """log2(p_s / m) and log2(p_t / m): one logarithm serves both."""
    larger = -tl.log2(mixture)
    return larger + tl.minimum(log_ratio, 0.0), larger - tl.maximum(log_ratio, 0.0)


@triton.jit
def _mixture_difference(log_ratio, smaller, mixture):
    """(p_s - p_t) / m."""
    distance = tl.abs(log_ratio) * LN_2
    gap = tl.where(distance < 0.5, distance - _exponential_rest(-distance), 1.0 - smaller) / mixture
    return tl.where(log_ratio < 0.0, -gap, gap)


@triton.jit
def _power_quotient(own, other, x, k):
    """own * (exp(k x) - 1) / k, own * x for k = 0; `other` is own * exp(k x)."""
    inverse = 1.0 / tl.where(k == 0.0, 1.0, k)
    exponent = tl.where(k == 0.0, 0.0, k * x)
    series = exponent * (exponent * (1.0 / 720.0) + 1.0 / 120.0) + 1.0 / 24.0
    series = exponent * (exponent * (exponent * series + 1.0 / 6.0) + 0.5) + 1.0
    return tl.where(tl.abs(exponent) < 0.25, times_unless_zero(own, x) * series, (other - own) * inverse)


@triton.jit
def _powers(log_student, log_teacher, alpha, beta):
    """p_s^(alpha + beta), p_t^(alpha + beta) and p_t^alpha p_s^beta; all 0 where neither side has any probability."""
    nowhere = float("-inf")
    neither = (log_student == nowhere) & (log_teacher == nowhere)
    # Finite logarithms: an exponent of 0 makes 1 of a probability of 0.
    log_student = tl.where(log_student == nowhere, -1e30, log_student)
    log_teacher = tl.where(log_teacher == nowhere, -1e30, log_teacher)
    student = tl.exp2((alpha + beta) * log_student)
    teacher = tl.exp2((alpha + beta) * log_teacher)
    cross = tl.exp2(alpha * log_teacher + beta * log_student)
    return tl.where(neither, 0.0, student), tl.where(neither, 0.0, teacher), tl.where(neither, 0.0, cross)


@triton.jit
def _alpha_beta_terms(ratios, alpha, beta):
    """With c = alpha + beta, x = log(p_t / p_s) and psi_k = (exp(k x) - 1) / k: the value's term is
    p_s^c (psi_c - psi_alpha) / beta, its limit p_s^c (x exp(alpha x) - psi_alpha) / alpha for beta = 0; the slope is
    -p_s^c psi_alpha. The limits of alpha and c are those of psi. Near x = 0 a series, in which nothing is divided.
    """
    both = alpha + beta
    x = -ratios.log_ratio * LN_2
    student, teacher, cross = _powers(ratios.log_student, ratios.log_teacher, alpha, beta)
    by_alpha = _power_quotient(student, cross, x, alpha)
    by_both = _power_quotient(student, teacher, x, both)
    limit = (times_unless_zero(cross, x) - by_alpha) / tl.where(alpha == 0.0, 1.0, alpha)
    far = tl.where(beta == 0.0, limit, (by_both - by_alpha) / tl.where(beta == 0.0, 1.0, beta))
    # Coefficients (both^n - alpha^n) / (both - alpha) / (n + 1)!, without the division.
    square = alpha * alpha
    second = both + alpha
    third = both * second + square
    fourth = both * third + square * alpha
    fifth = both * fourth + square * square
    largest = tl.maximum(tl.abs(alpha), tl.abs(both))
    small = tl.where(largest == 0.0, 0.0, x)  # with both at 0 the square is all, also of an infinite x
    series = small * (small * fifth * (1.0 / 720.0) + fourth * (1.0 / 120.0)) + third * (1.0 / 24.0)
    series = small * (small * series + second * (1.0 / 6.0)) + 0.5
    near = times_unless_zero(student, x * x) * series
    is_near = tl.abs(small) * largest < 0.25
    return tl.where(is_near, near, far), -by_alpha


@triton.jit
def _log2_product(ratios, alpha, beta):
    """log2(p_t^alpha p_s^beta) for beta = 1 - alpha; -inf where p_t = 0."""
    return tl.where(
        ratios.log_teacher == float("-inf"),
        float("-inf"),
        alpha * ratios.log_teacher + beta * ratios.log_student,
    )


@triton.jit
def divergence_terms(ratios, first, second, DIVERGENCE: tl.constexpr):
    """Of every column: a term of the value, and the slope. What is not used costs nothing.

    The slope is f where <f> is subtracted from it before it is multiplied by p_s, since both may be nearly equal; p_s f for
    alpha-beta and chi-squared, whose f is infinite where p_s is 0; dD/d(student logit / T) itself for forward KL and the
    decoupled one; log2(p_t^alpha p_s^(1 - alpha)) for Rényi's.
    """
    p_student = ratios.p_student
    p_teacher = ratios.p_teacher
    log_ratio = ratios.log_ratio
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "decoupled":
        value, slope = kl_terms(p_teacher, p_student, log_ratio * LN_2)
    elif DIVERGENCE == "reverse_kl":
        value, _ = kl_terms(p_student, p_teacher, -log_ratio * LN_2)
        # In log2, as `mean_slope` has it: the same roundings, which drop out of the difference.
        slope = log_ratio
    elif DIVERGENCE == "alpha_beta":
        value, slope = _alpha_beta_terms(ratios, first, second)
    elif DIVERGENCE == "renyi":  # a term of (sum - 1) / (alpha (alpha - 1)), exact where the rows agree
        value, _ = _alpha_beta_terms(ratios, first, second)
        slope = _log2_product(ratios, first, second)
    elif DIVERGENCE == "chi_squared":
        _, difference = kl_terms(p_teacher, p_student, log_ratio * LN_2)
        # The quotient of exponentials has one rounding less than that of the logarithms, where they do not underflow.
        quotient = tl.where(p_student > 1e-30, p_teacher / p_student, tl.exp2(-log_ratio))
        distance = -log_ratio * LN_2
        near = tl.abs(distance) < 0.5
        close = tl.where(near, distance, 0.0)
        excess = tl.where(near, close + _exponential_rest(close), quotient - 1.0)
        value = -times_unless_zero(difference, excess)
        slope = times_unless_zero(difference, 2.0 + excess)
    elif DIVERGENCE == "tvd":
        _, difference = kl_terms(p_teacher, p_student, log_ratio * LN_2)
        value = 0.5 * tl.abs(difference)
        slope = tl.where(difference > 0.0, 0.5, tl.where(difference < 0.0, -0.5, difference))
    else:
        rest = 1.0 - first
        smaller, mixture = _mixture(log_ratio, first)
        student_ratio, teacher_ratio = _mixture_logs(log_ratio, mixture)
        p_mixture = first * p_teacher + rest * p_student
        if DIVERGENCE == "jsd":
            teacher_part = times_unless_zero(p_teacher, teacher_ratio * LN_2)
            slope = rest * LN_2 * student_ratio
            value = first * teacher_part + times_unless_zero(p_student, slope)
        elif DIVERGENCE == "skew_kl":
            value, _ = kl_terms(p_teacher, p_mixture, -teacher_ratio * LN_2)
            slope = (rest * rest) * _mixture_difference(log_ratio, smaller, mixture)  # f + rest
        else:  # up to a constant
            value, _ = kl_terms(p_student, p_mixture, -student_ratio * LN_2)
            difference = _mixture_difference(log_ratio, smaller, mixture)
            slope = student_ratio * LN_2 - (first * rest) * difference
    return value, slope


@triton.jit
def uncentred_slope(ratios, first):
    """f of skew KL with its constant, which is small where the student is far above the teacher."""
    smaller, mixture = _mixture(ratios.log_ratio, first)
    return (first - 1.0) * tl.where(ratios.log_ratio < 0.0, 1.0, smaller) / mixture


@triton.jit
def new_slope_sums(LANES: tl.constexpr, DIVERGENCE: tl.constexpr):
    """What the pass before the last carries, of which no tile was taken: sums of the value, of <f>, and one more."""
    nothing = tl.zeros((LANES,), tl.float32)
    mean = nothing
    if DIVERGENCE == "renyi":
        mean = tl.full((LANES,), float("-inf"), tl.float32)
    return nothing, mean, nothing


@triton.jit
def slope_sums(mean, uncentred_mean, ratios, slope, first, DIVERGENCE: tl.constexpr):
    """Add one tile to <f>; for Rényi's to the largest logarithm and the sum of the products over it. Of skew KL with and without the constant, to be chosen between when the row is known; of TVD
    also to the sum of p_s, which is 1 but for its rounding: f is a half nearly everywhere, and <f> has to be as exact."""
    if DIVERGENCE == "renyi":
        mean, uncentred_mean, _ = softmax_step(mean, uncentred_mean, slope, 1.0)
    elif DIVERGENCE == "alpha_beta" or DIVERGENCE == "chi_squared":
        mean += tl.sum(slope, axis=1)
    elif DIVERGENCE != "forward_kl" and DIVERGENCE != "decoupled":
        mean += tl.sum(times_unless_zero(ratios.p_student, slope), axis=1)
    if DIVERGENCE == "skew_kl":
        uncentred_mean += tl.sum(times_unless_zero(ratios.p_student, uncentred_slope(ratios, first)), axis=1)
    elif DIVERGENCE == "tvd":
        uncentred_mean += tl.sum(ratios.p_student, axis=1)
    return mean, uncentred_mean


@triton.jit
def join_slope_sums(value, mean, uncentred_mean, first, second, DIVERGENCE: tl.constexpr):
    """Of a whole row, from every lane: the value, <f>, and <f> of the far slope; for Rényi's the largest logarithm of a
    product and the sum of the products over it."""
    value = tl.sum(value, axis=0)
    if DIVERGENCE == "renyi":
        largest = tl.max(mean, axis=0)
        mean, uncentred_mean = join_lanes(mean, uncentred_mean, 1.0)
        log_sum = tl.where(largest == float("inf"), largest, mean + tl.log2(uncentred_mean))
        # Where the sum is near 1 its logarithm, by the series of artanh, from a sum without the 1.
        half = -first * second * value
        half = half / (2.0 + half)
        square = half * half
        series = 2.0 * half * (square * (square * (square / 7.0 + 0.2) + 1.0 / 3.0) + 1.0)
        value = tl.where(tl.abs(log_sum) < 0.1, series, log_sum * LN_2) / -second
    else:
        mean = tl.sum(mean, axis=0)
        uncentred_mean = tl.sum(uncentred_mean, axis=0)
    return value, mean, uncentred_mean


@triton.jit
def centred_slope(ratios, slope, mean, far, first, DIVERGENCE: tl.constexpr):
    """dD/d(student logit / T) = p_s f - p_s <f>."""
    if DIVERGENCE == "skew_kl":
        slope = tl.where(far, uncentred_slope(ratios, first), slope)
    if DIVERGENCE == "renyi":
        # p_s - w, where w is the product made to sum to 1; in a row with a sum near 1 from the quotient of w and p_s.
        log_sum = mean - tl.log2(far)
        distance = tl.where(tl.abs(log_sum) < 0.1, (-first * ratios.log_ratio - log_sum) * LN_2, 1.0)
        near = tl.abs(distance) < 0.5
        close = tl.where(near, distance, 0.0)
        close += _exponential_rest(close)
        slope = tl.where(near, -ratios.p_student * close, ratios.p_student - tl.exp2(slope - mean) * far)
    elif DIVERGENCE == "alpha_beta" or DIVERGENCE == "chi_squared":
        slope = slope - ratios.p_student * mean
    elif DIVERGENCE == "reverse_kl":
        slope = times_unless_zero(ratios.p_student, (slope - mean) * LN_2)
    elif DIVERGENCE != "forward_kl" and DIVERGENCE != "decoupled":
        slope = times_unless_zero(ratios.p_student, slope - mean)
    return slope


@triton.jit
def ratio_step(ratio_sum, student_shifted, teacher_shifted, scale, DIVERGENCE: tl.constexpr):
    """Add one tile to the online sum of reverse KL: exp(student) (student - teacher), in logits, both measured from the
    row's maxima, so that an offset costs no digits."""
    if DIVERGENCE == "reverse_kl":
        ratios = times_unless_zero(tl.exp2(student_shifted * scale), student_shifted - teacher_shifted)
        ratio_sum += tl.sum(ratios, axis=1)
    return ratio_sum


@triton.jit
def ratio_move(ratio_sum, student_total, rescale, student_move, teacher_move, DIVERGENCE: tl.constexpr):
    """The online sum measured from other maxima: shifted logits are larger by the moves, exponentials by `rescale`."""
    if DIVERGENCE == "reverse_kl":
        moved = times_unless_zero(student_total, student_move - teacher_move) + ratio_sum
        ratio_sum = times_unless_zero(rescale, moved)
    return ratio_sum


@triton.jit
def mean_slope(
    ratio_sum, log_partition_ratio, inverse_student, inverse_temperature, DIVERGENCE: tl.constexpr
):
    """<f> of reverse KL from its online sum, in log2."""
    mean = 0.0
    if DIVERGENCE == "reverse_kl":
        mean = (ratio_sum * inverse_student) * (inverse_temperature * LOG2_E) - log_partition_ratio
    return mean
