"""Losses that compare relations inside a batch: between its samples, its positions or its channels.

What they build is B x B, N or D x D numbers, so they are plain PyTorch: no kernel pays here. Computed in float32 (float64
for float64 features), whatever autocast says. Those that do not depend on the size of the features are computed at one
size: the fourth powers of 1e-7 and of 1e10 that some of them take would leave float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, Literal, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_choice, shape_of
from ..core.matmul import autocast_off
from ..options import NORM_EPS
from ..reference.features import unit_rows
from ..reference.logits import wide
from .checks import check_batch, check_sequences

PKTKernel = Literal["cosine", "student_t"]
PKTDivergence = Literal["kl", "jeffreys"]

# Two samples that point in opposite directions have a cosine kernel of 0 and a logarithm of minus infinity.
MIN_KERNEL = 1e-7

# What the largest number is scaled to, as a power of two: fourth powers summed over any batch stay in float32, and what is
# then too short to have a direction is smaller than any rounding of the largest.
COMMON_EXPONENT = 12

LossFunction = TypeVar("LossFunction", bound=Callable[..., Tensor])


def _full_precision(loss: LossFunction) -> LossFunction:
    """The loss with autocast off: it would round the matmul of a Gram matrix."""

    @wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        first = args[0] if args else kwargs.get("student")
        # What is no tensor is refused by the loss itself.
        with autocast_off(first) if isinstance(first, Tensor) else nullcontext():
            return loss(*args, **kwargs)

    return cast(LossFunction, wrapped)


def _samples(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides as (B, d) with zeros in masked samples, and the mask (B,)."""
    check_batch(student, teacher, mask)
    if mask is None:
        mask = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    flat = (wide(side.flatten(1)) for side in (student, teacher))
    student, teacher = (side.masked_fill(~mask.unsqueeze(1), 0.0) for side in flat)
    return student, teacher, mask


def _scaled(features: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The features times a power of two, exact, that makes the largest number of them, or of those along `dim`, common.

    0 where the largest is below NORM_EPS: a gradient grows as features shrink, and would leave float32.
    """
    if features.numel() == 0:
        return features
    largest = torch.linalg.vector_norm(features.detach(), math.inf, dim=dim, keepdim=dim is not None)
    _, exponent = torch.frexp(largest)
    # Below this the factor itself would leave the dtype.
    least = math.frexp(torch.finfo(features.dtype).tiny)[1] - 1
    factor = torch.ldexp(torch.ones_like(largest), (COMMON_EXPONENT - exponent).clamp_min(least))
    return features * factor.masked_fill(largest < NORM_EPS, 0.0)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted values; a finite 0 with a graph where none counts."""
    return values.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    nothing = denominator == 0
    return (numerator / denominator.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _pairs(mask: Tensor) -> Tensor:
    """(B, B) bool: both samples count."""
    return mask.unsqueeze(0) & mask.unsqueeze(1)


def _distances(features: Tensor) -> Tensor:
    """(B, B) Euclidean distances from differences: those of a Gram matrix lose near neighbours."""
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


@_full_precision
def similarity_preserving_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the two row-normalised Gram matrices of a batch, mean over pairs of samples.

    Replaces:

        gram = lambda f: F.normalize(f.flatten(1) @ f.flatten(1).T, dim=1)
        loss = (gram(student) - gram(teacher)).square().sum() / B**2

    Args:
        student: (B, ...) features, flattened per sample. Any width, float16, bfloat16, float32 or float64.
        teacher: (B, ...), frozen; its width may differ.
        mask: (B,) bool, True for valid samples; None takes all. Ignored samples may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features); a finite 0 with a graph where no sample is valid. A sample of
            zeros has no direction: its row is 0 and gets no gradient. Features that are all below 1e-12 count as zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    Source: Tung & Mori, Similarity-Preserving Knowledge Distillation, 2019, equations 2 to 4.
    """
    student, teacher, mask = _samples(student, teacher, mask)
    student, teacher = _scaled(student), _scaled(teacher)
    difference = unit_rows(student @ student.T) - unit_rows(teacher @ teacher.T)
    return _mean(difference.square(), _pairs(mask))


@_full_precision
def rkd_distance_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the two sides' distances of samples, each side in units of its own mean distance.

    Replaces, with d the (B, B) distances of each side:

        loss = F.smooth_l1_loss(d_s / d_s[d_s > 0].mean(), d_t / d_t[d_t > 0].mean())

    Args:
        student: (B, ...) features, flattened per sample. Any width, float16, bfloat16, float32 or float64.
        teacher: (B, ...), frozen; its width may differ.
        mask: (B,) bool, True for valid samples; None takes all. Ignored samples may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features), the mean over all B x B pairs, the zeros of
            the diagonal among them, as in the authors' code; a finite 0 with a graph where no sample is valid.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    Samples that coincide have a distance of 0 and get no gradient of it.

    Source: Park et al., Relational Knowledge Distillation, 2019, equations 4 to 6.
    """
    student, teacher, mask = _samples(student, teacher, mask)
    pairs = _pairs(mask)

    def relative(features: Tensor) -> Tensor:
        distances = _distances(_scaled(features))
        return _ratio(distances, _mean(distances, pairs & (distances.detach() > 0)))

    return _mean(F.smooth_l1_loss(relative(student), relative(teacher), reduction="none"), pairs)


@_full_precision
def rkd_angle_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the cosines of the angles that any three samples form on either side.

    Replaces:

        unit = lambda f: F.normalize(f.unsqueeze(0) - f.unsqueeze(1), dim=2)                # (B, B, d)
        angle = lambda f: torch.bmm(unit(f), unit(f).transpose(1, 2))                       # (B, B, B)
        loss = F.smooth_l1_loss(angle(student), angle(teacher))

    Args:
        student: (B, ...) features, flattened per sample. Any width, float16, bfloat16, float32 or float64.
        teacher: (B, ...), frozen; its width may differ.
        mask: (B,) bool, True for valid samples; None takes all. Ignored samples may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features), the mean over all B x B x B triples, as in
            the authors' code; a finite 0 with a graph where no sample is valid.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    The angle of a triple with two equal samples is 0. Memory is B x B x (d + B).

    Source: Park et al., Relational Knowledge Distillation, 2019, equations 7 and 8.
    """
    student, teacher, mask = _samples(student, teacher, mask)

    def angles(features: Tensor) -> Tensor:
        features = _scaled(features)
        edges = unit_rows(features.unsqueeze(0) - features.unsqueeze(1))
        return edges @ edges.transpose(1, 2)

    triples = _pairs(mask).unsqueeze(0) & mask.view(-1, 1, 1)
    return _mean(F.smooth_l1_loss(angles(student), angles(teacher), reduction="none"), triples)


@_full_precision
def pkt_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: PKTKernel = "cosine",
    divergence: PKTDivergence = "kl",
    mask: Tensor | None = None,
) -> Tensor:
    """Divergence between the two sides' probabilities of picking one sample as the neighbour of another.

    Replaces, with K the (B, B) kernel of each side and p = K / K.sum(1, keepdim=True):

        cosine:    K = (F.cosine_similarity(f[:, None], f[None], dim=2) + 1) / 2
        student_t: K = 1 / (1 + torch.cdist(f, f))
        kl:        loss = (p_t * (p_t.log() - p_s.log())).mean()
        jeffreys:  loss = ((p_t - p_s) * (p_t.log() - p_s.log())).mean()

    Args:
        student: (B, ...) features, flattened per sample. Any width, float16, bfloat16, float32 or float64.
        teacher: (B, ...), frozen; its width may differ.
        kernel: "cosine" or "student_t". Default "cosine".
        divergence: "kl" or "jeffreys". Default "kl".
        mask: (B,) bool, True for valid samples; None takes all. Ignored samples may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features), the mean over all B x B pairs, as in the authors' code; a finite 0 with a graph where no sample is valid.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    A sample is among its own neighbours; kernels are at least 1e-7. A sample with nothing above 1e-12 has a cosine of 0 with
    every other. The distances of student_t are in units of the features: a distance of 1e7 and more has no gradient.

    Source: Passalis & Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, 2018, equations 2 to 6
    (kl, cosine); Passalis et al., Heterogeneous Knowledge Distillation using Information Flow Modeling, 2020, equations
    4 to 7 (jeffreys, both kernels added up).
    """
    check_choice("kernel", kernel, get_args(PKTKernel))
    check_choice("divergence", divergence, get_args(PKTDivergence))
    student, teacher, mask = _samples(student, teacher, mask)
    pairs = _pairs(mask)

    def log_probabilities(features: Tensor) -> Tensor:
        if kernel == "cosine":
            units = unit_rows(_scaled(features, 1))
            values = (units @ units.T + 1.0) / 2.0
        else:
            values = 1.0 / (1.0 + _distances(features))
        values = values.clamp_min(MIN_KERNEL).masked_fill(~pairs, 0.0)
        probabilities = _ratio(values, values.sum(1, keepdim=True))
        return probabilities.masked_fill(~pairs, 1.0).log()

    log_p_s, log_p_t = log_probabilities(student), log_probabilities(teacher)
    weights = log_p_t.exp() if divergence == "kl" else log_p_t.exp() - log_p_s.exp()
    return _mean(weights * (log_p_t - log_p_s), pairs)


@_full_precision
def linear_cka_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """One minus the linear centred kernel alignment of two sets of features.

    Replaces, with the columns of both sides centred:

        cka = (teacher.T @ student).norm()**2 / ((student.T @ student).norm() * (teacher.T @ teacher).norm())
        loss = 1 - cka

    Args:
        student: (B, ...) features, flattened per sample. Any width, float16, bfloat16, float32 or float64.
        teacher: (B, ...), frozen; its width may differ.
        mask: (B,) bool, True for valid samples; None takes all. Ignored samples may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features), between 0 and 1; a finite 0 with a graph where no sample is valid.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    A side whose samples are all equal has a CKA of 0. Computed from the two B x B Gram matrices, which have the same norms.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019, section 3.
    """
    student, teacher, mask = _samples(student, teacher, mask)
    count = mask.sum().clamp_min(1)

    def unit_gram(features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, B) of length 1, and whether there was any length."""
        features = _scaled(features)
        # Twice: what rounding left of equal samples is equal again, and few enough digits for an exact mean.
        for _ in range(2):
            features = (features - features.sum(0) / count).masked_fill(~mask.unsqueeze(1), 0.0)
        gram = features @ features.T
        length = torch.linalg.vector_norm(gram)
        return _ratio(gram, length), length > 0

    (gram_s, varies_s), (gram_t, varies_t) = unit_gram(student), unit_gram(teacher)
    # 1 - <a, b> of unit vectors, from their difference: exact near 0.
    half = 0.5 * (gram_s - gram_t).square().sum()
    return torch.where(varies_s & varies_t, half, 1.0 + 0.0 * half) * mask.any()


@_full_precision
def attention_transfer_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the two sides' maps of activity over positions, each map at length 1.

    Replaces:

        activity = lambda f: F.normalize(f.square().mean(-1), dim=1)                        # (B, N)
        loss = (activity(student) - activity(teacher)).square().mean()

    Args:
        student: (B, N, D_s), float16, bfloat16, float32 or float64.
        teacher: (B, N, D_t), frozen; its width may differ.
        mask: (B, N) bool, True for valid positions; None takes all. Ignored positions may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features), the mean over the valid positions; a finite 0 with a graph
            where there is none. Of a sample whose features are all below 1e-12 the map is 0 and gets no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    Source: Zagoruyko & Komodakis, Paying More Attention to Attention, 2017, equation 2 (p = 2, mean of squares).
    """
    mask = check_sequences(student, teacher, mask)

    def activity(features: Tensor) -> Tensor:
        features = wide(features).masked_fill(~mask.unsqueeze(2), 0.0)
        return unit_rows(_scaled(features, (1, 2)).square().mean(-1))

    return _mean((activity(student) - activity(teacher)).square(), mask)


@_full_precision
def fsp_loss(
    student: Tensor,
    student_next: Tensor,
    teacher: Tensor,
    teacher_next: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared difference of the two sides' flow between two layers: their products of channels, mean over positions.

    Replaces:

        flow = lambda first, second: first.transpose(1, 2) @ second / N                     # (B, D, D')
        loss = (flow(student, student_next) - flow(teacher, teacher_next)).square().mean()

    Args:
        student: (B, N, D), an earlier layer of the student; float16, bfloat16, float32 or float64.
        student_next: (B, N, D'), a later layer of the student.
        teacher: (B, N, D), frozen.
        teacher_next: (B, N, D'), frozen.
        mask: (B, N) bool, True for valid positions; None takes all. Ignored positions may hold anything.

    Returns:
        Tensor: 0-D float32 (float64 for float64 features), the mean over channel pairs and over the samples with a valid
            position; a finite 0 with a graph where there is none. It grows with the fourth power of the features and is
            infinite in float32 where these are 1e10 and more.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, different widths among them; a teacher that requires grad.

    Source: Yim et al., A Gift from Knowledge Distillation, 2017, equations 1 and 2.
    """
    mask = check_sequences(student, teacher, mask, same_width=True)
    if isinstance(student_next, Tensor) and student_next.shape[:2] != student.shape[:2]:
        raise ValueError(
            "student and student_next must have the same batch and length, got shapes "
            f"{shape_of(student)} and {shape_of(student_next)}"
        )
    check_sequences(student_next, teacher_next, mask, same_width=True, names=("student_next", "teacher_next"))
    count = mask.sum(1)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        first, second = (wide(side).masked_fill(~mask.unsqueeze(2), 0.0) for side in (first, second))
        return first.transpose(1, 2) @ second / count.clamp_min(1).view(-1, 1, 1)

    difference = flow(student, student_next) - flow(teacher, teacher_next)
    return _mean(difference.square().mean((1, 2)), count > 0)
