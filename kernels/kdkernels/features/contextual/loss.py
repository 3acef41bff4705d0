"""Relations between neighbouring tokens and between layers: `contextual_relation_loss`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ...core import checks
from ...core.backend import resolve_impl
from ...core.dispatch import row_loss, traceable
from ...core.matmul import accum_dtype, autocast_off
from ...options import Impl
from ...reference.contextual import axis_loss
from ...reference.relation_counts import Average, RelationCounts, Variant, count_relations
from .blocks import ContextualRelations
from .checks import check_layer_features, check_window


@traceable
def contextual_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    window: int = 10,
    mask: Tensor | None = None,
    distance_weight: float = 1.0,
    angle_weight: float = 1.0,
    layer_weight: float = 0.0,
    variant: Variant = "study",
    average: Average = "relations",
    impl: Impl | None = None,
) -> Tensor:
    """Contextual distillation (CKD): how tokens lie to their neighbours, and layers to each other, as in the teacher.

    Replaces these lines for every relation of a token with the 2 * window + 1 positions around it, without any of
    their (B, L, N, 2 * window + 1, D) tensors; `W` (N, 2 * window + 1) holds the positions, and relations with
    positions outside the sequence are set to 0 on both sides:

        unit = F.normalize(features, dim=-1)
        distance = 1 - (unit[:, :, :, None] * unit[:, :, W]).sum(-1)                # (B, L, N, 2 window + 1)
        step = F.normalize(features[:, :, :, None] - features[:, :, W], dim=-1)
        angle = torch.einsum("blnvd,blnwd->blnvw", step, step)
        relation = distance_weight * F.mse_loss(distance_student, distance_teacher)
        relation += angle_weight * F.mse_loss(angle_student, angle_teacher)

    That is the word relation. The layer-transforming relation is the same of the layers of one token, features
    transposed to (B, N, L, D), and the loss is word relation + layer_weight * layer-transforming relation.

    Args:
        student: (B, L, N, D_s), float16, bfloat16, float32 or float64: features of L layers.
        teacher: (B, L, N, D_t), frozen. Its width and dtype may differ.
        window: neighbours on either side, at least 1; every pair of positions where it reaches the length of
            the axis, as it does over few layers. Default 10.
        mask: (B, N) bool, True where a token counts. With a mask a mean is taken over the relations of which every
            end exists and counts, so that a value does not depend on how far a batch is padded. Without one it
            is the study's, in which positions outside the sequence count as relations with error 0.
        distance_weight: factor of the cosine distances. Default 1.0.
        angle_weight: factor of the angles. Default 1.0.
        layer_weight: factor of the layer-transforming relation; the study uses 10 (1 in its example). Default 0.0,
            which does not compute it.
        variant: "study", or "official": the distances as in the authors' code, softmax over the similarities of
            a token with every other one of its sequence (whatever the window) and KL(teacher, student),
            divided by the number of pairs; angles as with a mask.
        average: "relations", the mean over all relations of the batch, in which longer samples count more; or
            "samples", the mean over samples of each one's own mean, which does not depend on how a batch is cut into
            equal parts. Default "relations".
        impl: None takes triton for CUDA and ROCm tensors, torch elsewhere; "reference" is eager float32.

    Returns:
        Tensor: 0-D, float32 (float64 for float64 features). Without a valid relation a finite 0 with a graph.

    Only the student gets a gradient. Vectors and differences shorter than 1e-12 have no direction: their
    relations are 0 and have no gradient. Longer than 1e16 they may lose digits, and longer than 1e18 may give NaN, as their
    squares leave float32.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a teacher that requires grad.

    Memory beyond the inputs is the gradient and scratch of 0.6 of the student's features, or 8 MiB if that is more,
    for any window; wide windows cost time. The gradient is computed in forward; from half-precision features in backward,
    with the relations again, and with fewer than four samples it is kept in float32 until it is rounded.

    Source: Park et al., Distilling Linguistic Context for Language Model Compression (EMNLP 2021), word relation and
    layer-transforming relation; study: arXiv 2508.15423, whose code compares them by plain mean squared errors.
    """
    check_layer_features(student, teacher, mask)
    check_window(window)
    for name, weight in (
        ("distance_weight", distance_weight), ("angle_weight", angle_weight), ("layer_weight", layer_weight)
    ):  # fmt: skip
        checks.check_number(name, weight)
    checks.check_choice("variant", variant, get_args(Variant))
    checks.check_choice("average", average, get_args(Average))
    checks.check_impl(impl)
    impl = resolve_impl(impl, student.device, student.dtype)
    factors = _Factors(distance_weight, angle_weight, layer_weight)
    with autocast_off(student):
        if impl == "reference":
            return _reference_loss(student, teacher, mask, window, variant, average, factors)
        scales = torch.stack(
            [
                torch.stack([distance / counts.pairs, angle / counts.triples])
                .view(2, -1)
                .expand(2, len(student))
                for _, counts, distance, angle in _axes(student, mask, window, variant, average, factors)
            ]
        )
        solver = ContextualRelations(impl, window, variant, distance_weight != 0.0, angle_weight != 0.0)
        one = torch.ones((), dtype=accum_dtype(student.dtype), device=student.device)
        # A half-precision gradient is rounded once, with the upstream gradient (a loss scale, say) in it.
        in_forward = student.dtype == one.dtype
        return row_loss(
            solver, (student, teacher, mask, scales), None, one, "sum", gradient_in_forward=in_forward
        )


class _Factors(NamedTuple):
    """What the terms of the loss are multiplied with."""

    distance: float
    angle: float
    layer: float


def _axes(
    student: Tensor,
    mask: Tensor | None,
    window: int,
    variant: Variant,
    average: Average,
    factors: _Factors,
) -> Iterator[tuple[bool, RelationCounts, float, float]]:
    """Per axis with a weight: whether it is transposed, its counts, the weights of distances and angles."""
    for transposed, factor in ((False, 1.0), (True, factors.layer)):
        if factor == 0.0:
            continue
        batch, layers, length = student.shape[:3]
        shape = (batch, length, layers) if transposed else (batch, layers, length)
        valid = None if mask is None else mask.unsqueeze(2 if transposed else 1).expand(shape)
        counts = count_relations(
            shape, valid, window, variant, average, student.device, accum_dtype(student.dtype)
        )
        yield transposed, counts, factor * factors.distance, factor * factors.angle


def _reference_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    window: int,
    variant: Variant,
    average: Average,
    factors: _Factors,
) -> Tensor:
    loss = student.new_zeros((), dtype=accum_dtype(student.dtype))
    if average == "samples":
        loss = loss + student[..., :0].sum()  # 0, with a graph
        for one in range(len(student)):
            sample = slice(one, one + 1)
            part = None if mask is None else mask[sample]
            sides = (student[sample], teacher[sample])
            loss = loss + _reference_loss(*sides, part, window, variant, "relations", factors) / len(student)
        return loss
    for transposed, counts, distance, angle in _axes(student, mask, window, variant, average, factors):
        # The sequences of an axis: the tokens of a layer, or the layers of a token.
        sides = (student.transpose(1, 2), teacher.transpose(1, 2)) if transposed else (student, teacher)
        valid = None
        if mask is not None:
            valid = mask.unsqueeze(2 if transposed else 1).expand(sides[0].shape[:3])
        loss = loss + axis_loss(*sides, valid, window, variant, distance, angle, counts)
    return loss
