"""Losses between inner layers, feature by feature: `projection_mse` and `cosine_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import reduce_rows
from ..core.backend import load_backend, resolve_impl
from ..core.dispatch import row_loss, traceable
from ..core.matmul import accum_dtype, autocast_dtype, autocast_off
from ..core.rows import row_weights
from ..options import Distance, Impl, Project, Reduction
from ..reference.features import projection_row_losses
from .checks import check_features, check_layer_pairs
from .distance import ProjectionDistance

Features = Tensor | Sequence[Tensor]
Projections = Tensor | Sequence[Tensor | None] | None

# Twice the size of the differences that float16 gradients have to hold without overflow, see `autograd.Solver`.
HALF_BOUND = 32.0


@traceable
def projection_mse(
    student: Features,
    teacher: Features,
    weight: Projections = None,
    bias: Projections = None,
    *,
    project: Project = "student",
    normalize: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """Mean squared error between projected student features and teacher features.

    Replaces, without keeping the projection, the difference or the normalised features for backward:

        loss = F.mse_loss(F.linear(student, weight, bias)[mask], teacher[mask])   # project="student"
        loss = F.mse_loss(student[mask], F.linear(teacher, weight, bias)[mask])   # project="teacher"
        loss = F.mse_loss(F.normalize(student[mask], dim=-1),                     # project="teacher", normalize=True
                          F.normalize(F.linear(teacher, weight, bias)[mask], dim=-1))

    Args:
        student: (..., D_s), float16, bfloat16, float32 or float64. Or a list of such tensors, one per layer pair.
        teacher: (..., D_t), frozen; its dtype may differ when it is not the projected side, and the student's says in how
            many digits both are compared. A list with a list.
        weight: (D_t, D_s) for project="student", (D_s, D_t) for project="teacher"; None compares the
            features as they are and needs D_s == D_t. With lists: one of these for every pair, or a list of them.
        bias: (D_t,) or (D_s,), as the rows of `weight`; with lists as `weight`. Only with `weight`.
        project: which side is mapped onto the other's width. Default "student".
        normalize: divide both sides, the mapped one after its bias, by their L2 norm. A feature shorter than 1e-12
            has no direction: it counts as the zero vector and gets no gradient; one longer than 1e18 may give NaN, as
            its square leaves float32. Default False.
        mask: (...) bool, True for valid rows; None takes every row. One mask serves every pair.
        reduction: "mean" divides the sum by valid rows times width, as F.mse_loss of the valid rows;
            "sum" adds up the valid rows; "none" returns each row's sum of squared differences, shape (...),
            0 where the mask is False. Several pairs: the mean of their means, the sum of their sums, and
            for "none" a new first axis, one entry per pair.
        impl: None takes triton for CUDA and ROCm tensors, torch elsewhere; "reference" is eager float32.

    Returns:
        Tensor: float32 (float64 for float64 features): 0-D, or (...) for reduction="none". A mask without a True
            returns a finite 0 with a graph.

    Gradients reach student, weight and bias, in their own dtypes. The loss has no second derivative.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a teacher that requires grad.

    Source: the hidden-state objective of FitNets (Romero et al., 2015) and TinyBERT (Jiao et al., 2020); normalised,
    of PKD (Sun et al., 2019, equation 7).
    """
    checks.check_flag("normalize", normalize)
    distance: Distance = "normalized" if normalize else "squared"
    return _pairs_loss(student, teacher, weight, bias, project, distance, mask, reduction, impl)


@traceable
def cosine_loss(
    student: Features,
    teacher: Features,
    weight: Projections = None,
    bias: Projections = None,
    *,
    project: Project = "student",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """One minus the cosine of the angle between projected student features and teacher features.

    Replaces, without keeping the projection or the normalised features for backward:

        cosine = F.cosine_similarity(F.linear(student, weight, bias)[mask], teacher[mask], dim=-1)
        loss = (1.0 - cosine).mean()

    Args:
        student: (..., D_s), float16, bfloat16, float32 or float64. Or a list of such tensors, one per layer pair.
        teacher: (..., D_t), frozen; its dtype may differ when it is not the projected side, and the student's says in how
            many digits both are compared. A list with a list.
        weight: (D_t, D_s) for project="student", (D_s, D_t) for project="teacher"; None compares the
            features as they are and needs D_s == D_t. With lists: one of these for every pair, or a list of them.
        bias: (D_t,) or (D_s,), as the rows of `weight`; with lists as `weight`. Only with `weight`.
        project: which side is mapped onto the other's width. Default "student".
        mask: (...) bool, True for valid rows; None takes every row. One mask serves every pair.
        reduction: "mean" divides the sum by the number of valid rows; "sum"; "none" returns 1 - cosine of each row, shape
            (...), 0 where the mask is False. Several pairs: the mean of their means, the sum of their sums, and
            for "none" a new first axis, one entry per pair.
        impl: None takes triton for CUDA and ROCm tensors, torch elsewhere; "reference" is eager float32.

    Returns:
        Tensor: float32 (float64 for float64 features), between 0 and 2: 0-D, or (...) for reduction="none". A mask without
            a True returns a finite 0 with a graph.

    A feature shorter than 1e-12 has no direction: its cosine is 0 and it gets no gradient; one longer than 1e18 may be NaN,
    as its square leaves float32. Near 0 the loss keeps its digits: it is computed from the difference of the two unit
    vectors, not as 1 - cosine. Gradients reach student, weight and bias, in their own dtypes.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a teacher that requires grad.

    Source: the cosine embedding loss of DistilBERT (Sanh et al., 2019, section 3).
    """
    return _pairs_loss(student, teacher, weight, bias, project, "cosine", mask, reduction, impl)


@dataclass(frozen=True)
class _Pair:
    student: Tensor
    teacher: Tensor
    weight: Tensor | None
    bias: Tensor | None


def _pairs_loss(
    student: Features,
    teacher: Features,
    weight: Projections,
    bias: Projections,
    project: Project,
    distance: Distance,
    mask: Tensor | None,
    reduction: Reduction,
    impl: Impl | None,
) -> Tensor:
    """Check everything, then one loss per layer pair, and their mean, sum or stack."""
    checks.check_choice("project", project, get_args(Project))
    checks.check_reduction(reduction, None)
    checks.check_impl(impl)
    if not isinstance(student, list | tuple):
        pair = _Pair(student, teacher, weight, bias)  # pyright: ignore[reportArgumentType]
        _check(pair, project, mask)
        return _pair_loss(pair, project, distance, mask, reduction, impl)
    pairs = [_Pair(*tensors) for tensors in check_layer_pairs(student, teacher, weight, bias)]
    for number, pair in enumerate(pairs, 1):
        try:
            _check(pair, project, mask)
        except ValueError as error:
            raise ValueError(f"layer pair {number} of {len(pairs)}: {error}") from None
    for pair in pairs[1:] if reduction == "none" else ():
        if (given := pair.student.shape[:-1]) != (first := pairs[0].student.shape[:-1]):
            raise ValueError(
                f"reduction='none' stacks the rows of all layer pairs, which have shapes {tuple(first)} and {tuple(given)}; call "
                "once for each of them, or use 'mean' or 'sum'"
            )
    losses = torch.stack([_pair_loss(pair, project, distance, mask, reduction, impl) for pair in pairs])
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _check(pair: _Pair, project: Project, mask: Tensor | None) -> None:
    cast = autocast_dtype(checks.check_tensor("student", pair.student))
    check_features(pair.student, pair.teacher, pair.weight, pair.bias, project, same_dtype=cast is None)
    checks.check_bool_mask(mask, pair.student, pair.student.shape[:-1], "row")


def _pair_loss(
    pair: _Pair,
    project: Project,
    distance: Distance,
    mask: Tensor | None,
    reduction: Reduction,
    impl: Impl | None,
) -> Tensor:
    """The loss of one checked layer pair."""
    student, teacher, weight, bias = pair.student, pair.teacher, pair.weight, pair.bias
    cast = autocast_dtype(student)
    impl = resolve_impl(impl, student.device, student.dtype)
    leading, width = student.shape[:-1], (teacher if project == "student" else student).shape[-1]
    student, teacher = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    with autocast_off(student):
        counted = row_weights(
            student.shape[0],
            None if mask is None else mask.reshape(-1),
            None,
            None,
            student.device,
            accum_dtype(student.dtype),
        )
        denominator = counted.denominator if distance == "cosine" else counted.denominator * width
        if impl == "reference":
            values = projection_row_losses(
                student,
                teacher,
                weight,
                bias,
                counted.weight,
                project,
                distance,
                None if weight is None else cast,
            )
            loss = reduce_rows(values, counted.weight, denominator, reduction)
        else:
            dtype = student.dtype if weight is None else cast or weight.dtype
            solver = ProjectionDistance(
                load_backend(impl), project, distance, cast, HALF_BOUND if dtype == torch.float16 else None
            )
            loss = row_loss(
                solver,
                (student, teacher, weight, bias),
                counted.weight,
                denominator,
                reduction,
                gradient_in_forward=True,
            )
    return loss.reshape(leading) if reduction == "none" else loss
