"""The specification of the losses between inner layers, as plain eager PyTorch in float32 (float64 for float64)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.matmul import accum_dtype
from ..core.rows import inverse_length
from ..divergences import ForwardKL
from ..options import Distance, Project
from .logits import divergence, linear


def unit_rows(features: Tensor) -> Tensor:
    """(..., D) rows of length 1; a row shorter than NORM_EPS becomes 0 and gets no gradient.

    NaN where the squares are too large for the dtype.
    """
    return features * inverse_length(torch.linalg.vector_norm(features, dim=-1, keepdim=True))


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
        masked = (weight == 0).unsqueeze(1)
        student, teacher = student.masked_fill(masked, 0.0), teacher.masked_fill(masked, 0.0)
    source, target = (student, teacher) if project == "student" else (teacher, student)
    if cast is not None and head is not None:
        source, head = source.to(cast), head.to(cast)
    # The student's dtype says how many digits there are, whatever the teacher has.
    dtype = accum_dtype(student.dtype)
    source, target = source.to(dtype), target.to(dtype)
    head, bias = (None if side is None else side.to(dtype) for side in (head, bias))
    projected = linear(source, head, bias)
    if distance != "squared":
        projected, target = unit_rows(projected), unit_rows(target)
    if distance == "cosine":
        loss = 1.0 - (projected * target).sum(-1)
    else:
        loss = (projected - target).square().sum(-1)
    return loss if weight is None else loss.masked_fill(weight == 0, 0.0)


def _log_relations(
    q: Tensor,  # (B, N, D)
    k: Tensor,  # (B, N, D)
    allowed: Tensor,  # (B, 1, N, N) bool
    heads: int,
    dtype: torch.dtype,
) -> Tensor:
    """(B, heads, N, N) log-probabilities of a token's relations to the allowed ones."""
    q, k = (side.to(dtype).unflatten(2, (heads, -1)).transpose(1, 2) for side in (q, k))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return F.log_softmax(scores.masked_fill(~allowed, -math.inf), -1)


def relation_row_losses(
    student_q: Tensor,  # (B, N, D_s)
    teacher_q: Tensor,  # (B, N, D_t)
    student_k: Tensor | None,
    teacher_k: Tensor | None,
    mask: Tensor | None,  # (B, N) bool
    heads: tuple[int, int],  # student, teacher
    causal: bool,
) -> Tensor:
    """(B, N) sums over heads of KL(teacher relations, student relations); 0 where the mask is False."""
    batch, length, _ = student_q.shape
    counted = student_q.new_ones((batch, length), dtype=torch.bool) if mask is None else mask
    # A masked token may be compared with all: its row is dropped, and a softmax needs an entry.
    allowed = (counted.unsqueeze(1) | ~counted.unsqueeze(2)).unsqueeze(1)
    if causal:
        allowed = allowed & allowed.new_ones((length, length)).tril()
    pairs, dtype = max(heads), accum_dtype(student_q.dtype)
    sides = []
    for q, k, count in ((student_q, student_k, heads[0]), (teacher_q, teacher_k, heads[1])):
        q = q.masked_fill(~counted.unsqueeze(2), 0.0)
        k = q if k is None else k.masked_fill(~counted.unsqueeze(2), 0.0)
        sides.append(_log_relations(q, k, allowed, count, dtype).repeat_interleave(pairs // count, 1))
    return divergence(sides[0], sides[1], ForwardKL()).sum(1).masked_fill(~counted, 0.0)
