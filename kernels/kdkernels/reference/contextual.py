"""The specification of `contextual_relation_loss`: relations of neighbours on one axis, in eager PyTorch.

An axis is a set of sequences (B, Q, M, D): the tokens of every layer (Q = L, M = N), or, for the
layer-transforming relation, the layers of every token (Q = N, M = L). V is the number of neighbours that a
position is related to: 2 * window + 1 with itself in the middle, or all M when window >= M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.matmul import accum_dtype
from .features import unit_rows
from .relation_counts import RelationCounts, Variant


def _neighbours(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(M, V) positions of the neighbours, moved inside where they lie outside, and whether they lie inside."""
    positions = torch.arange(length, device=device)
    if window >= length:
        index = positions.expand(length, length)
        return index, torch.ones_like(index, dtype=torch.bool)
    index = positions[:, None] + torch.arange(-window, window + 1, device=device)
    return index.clamp(0, max(length - 1, 0)), (index >= 0) & (index < length)


def cosine_distances(features: Tensor, index: Tensor) -> Tensor:
    """1 - cos(f_i, f_j) of every position and neighbour: (B, Q, M, D) to (B, Q, M, V)."""
    directions = unit_rows(features)
    return 1.0 - torch.einsum("bqmd,bqmvd->bqmv", directions, directions[:, :, index])


def cosine_angles(features: Tensor, index: Tensor) -> Tensor:
    """cos of the angle at f_i between f_j and f_k: (B, Q, M, D) to (B, Q, M, V, V)."""
    steps = unit_rows(features.unsqueeze(3) - features[:, :, index])
    return torch.einsum("bqmvd,bqmwd->bqmvw", steps, steps)


def _softmax_divergence(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Sum over positions of KL(softmax of teacher similarities, softmax of student similarities), self left out."""
    length = student.shape[2]
    index, _ = _neighbours(length, length, student.device)
    other = counted & ~torch.eye(length, dtype=torch.bool, device=student.device)
    # A position without another one to compare with has no distribution: its row is a softmax over nothing.
    lonely = ~other.any(-1, keepdim=True)
    log_p_s, log_p_t = (
        (1.0 - cosine_distances(side, index))
        .masked_fill(~other & ~lonely, -torch.inf)
        .log_softmax(-1)
        .masked_fill(~other, 0.0)
        for side in (student, teacher)
    )
    return (log_p_t.exp() * (log_p_t - log_p_s)).masked_fill(~other, 0.0).sum()


def axis_loss(
    student: Tensor,  # (B, Q, M, D_s)
    teacher: Tensor,  # (B, Q, M, D_t)
    valid: Tensor | None,  # (B, Q, M) bool: valid positions; None takes every relation of the window
    window: int,
    variant: Variant,
    distance_weight: float,
    angle_weight: float,
    counts: RelationCounts,
) -> Tensor:
    """distance_weight * distance relation + angle_weight * angle relation of one axis, 0-D."""
    dtype = accum_dtype(student.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if valid is None:
        valid = torch.ones(student.shape[:3], dtype=torch.bool, device=student.device)
    # Padding may hold anything; replacing it first keeps NaN out of the gradient too.
    student, teacher = (side.masked_fill(~valid.unsqueeze(-1), 0.0) for side in (student, teacher))
    index, inside = _neighbours(student.shape[2], window, student.device)
    counted = valid.unsqueeze(-1) & valid[:, :, index] & inside

    loss = student[..., :0].sum()  # 0, with a graph
    if distance_weight != 0.0 and variant == "official":
        pairs = valid.unsqueeze(-1) & valid.unsqueeze(-2)
        loss = loss + distance_weight / counts.pairs * _softmax_divergence(student, teacher, pairs)
    elif distance_weight != 0.0:
        error = cosine_distances(student, index) - cosine_distances(teacher, index)
        loss = loss + distance_weight / counts.pairs * error.masked_fill(~counted, 0.0).square().sum()
    if angle_weight != 0.0:
        both = counted.unsqueeze(-1) & counted.unsqueeze(-2)
        error = cosine_angles(student, index) - cosine_angles(teacher, index)
        loss = loss + angle_weight / counts.triples * error.masked_fill(~both, 0.0).square().sum()
    return loss
