"""The specification of the losses between inner layers, as plain eager PyTorch in float32 (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import LEAST_LENGTH, Distance, Project
from .reference import linear, wide


def unit_rows(features: Tensor) -> Tensor:
    """(..., D) rows of length 1; a row shorter than LEAST_LENGTH becomes 0 and gets no gradient."""
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    short = length < LEAST_LENGTH
    return features * length.masked_fill(short, 1.0).reciprocal().masked_fill(short, 0.0)


def projection_row_losses(
    student: Tensor,  # (N, D_s)
    teacher: Tensor,  # (N, D_t)
    head: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,  # (N,)
    project: Project,
    distance: Distance,
    cast: torch.dtype | None,  # what autocast makes of the projected side and of head
) -> Tensor:
    """(N,) distances between the projected side and the other; 0 in rows of weight 0."""
    if weight is not None:
        dead = (weight == 0).unsqueeze(1)
        student, teacher = student.masked_fill(dead, 0.0), teacher.masked_fill(dead, 0.0)
    source, target = (student, teacher) if project == "student" else (teacher, student)
    if cast is not None and head is not None:
        source, head = source.to(cast), head.to(cast)
    projected, target = linear(source, head, bias), wide(target)
    if distance != "squared":
        projected, target = unit_rows(projected), unit_rows(target)
    if distance == "cosine":
        loss = 1.0 - (projected * target).sum(-1)
    else:
        loss = (projected - target).square().sum(-1)
    return loss if weight is None else loss.masked_fill(weight == 0, 0.0)
