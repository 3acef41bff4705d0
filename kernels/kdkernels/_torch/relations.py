"""Relations of tokens to tokens, one sequence and a few rows of its maps at a time.

A map of N x N relations is a matrix of logits over N columns, so its rows are worked on by `kd_rows`, as those of a
vocabulary are: scores of both sides by two matmuls, their gradient in place, two more matmuls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.matmul import accum_dtype
from ..options import RowTerms
from .rows import kd_rows

# Scores of one side held at a time on the CPU, 2 MiB: both sides, and what `kd_rows` makes of them, stay in the caches.
CHUNK_ELEMENTS = 1 << 19

# The same on other devices: 256 MiB.
DEVICE_CHUNK_ELEMENTS = 1 << 26

RELATION_STATE = 0


def _split(features: Tensor, index: Tensor | None, heads: int, pairs: int, dtype: torch.dtype) -> Tensor:
    """(pairs, M, d) contiguous: the counted tokens of one sequence (N, D), head by head, each as often as it is compared."""
    features = features if index is None else features.index_select(0, index)
    features = features.to(dtype).unflatten(1, (heads, -1)).transpose(0, 1)
    return features.repeat_interleave(pairs // heads, 0) if pairs > heads else features.contiguous()


def _join(gradient: Tensor, index: Tensor | None, heads: int, out: Tensor) -> None:
    """out (N, D) = gradient (pairs, M, d) of a split, summed over what was repeated; rows not in `index` stay."""
    pairs, rows, width = gradient.shape
    if pairs > heads:
        gradient = gradient.view(heads, pairs // heads, rows, width).sum(1)
    if index is None:
        out.unflatten(1, (heads, width)).copy_(gradient.transpose(0, 1))
    else:
        out.index_copy_(0, index, gradient.transpose(0, 1).reshape(rows, heads * width))


def _indices(mask: Tensor | None) -> list[Tensor | None] | None:
    """The counted tokens of each sequence; on a device a host sync, for their numbers."""
    if mask is None:
        return None
    counts = mask.sum(1).tolist()
    return [
        None if count == len(row) else torch.nonzero_static(row, size=count).squeeze(1)
        for row, count in zip(mask.unbind(), counts, strict=True)
    ]


def _solve_sequence(
    student: tuple[Tensor, Tensor],  # q and k (P, M, d_s), q divided by sqrt(d_s)
    teacher: tuple[Tensor, Tensor],  # q and k (P, M, d_t), likewise
    causal: bool,
    weight: Tensor | None,  # (M,)
    # (P, M, d_s) each: of the divided q, written, and of k, added to
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(M,) sums over the P maps of one sequence in which every token counts."""
    (q_s, k_s), (q_t, k_t) = student, teacher
    pairs, rows, _ = q_s.shape
    values = q_s.new_zeros(rows)
    if rows == 0:
        return values
    most = CHUNK_ELEMENTS if q_s.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = max(1, min(rows, most // rows))  # rows of a map at a time
    together = max(1, min(pairs, most // (step * rows)))  # maps at a time, where one is small
    scores = q_s.new_empty((2, together * step * rows))
    for head in range(0, pairs, together):
        maps = slice(head, min(head + together, pairs))
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            height, columns = here.stop - start, here.stop if causal else rows
            shape = (maps.stop - head, height, columns)
            scores_s, scores_t = (side[: math.prod(shape)].view(shape) for side in scores)
            torch.bmm(q_s[maps, here], k_s[maps, :columns].transpose(1, 2), out=scores_s)
            torch.bmm(q_t[maps, here], k_t[maps, :columns].transpose(1, 2), out=scores_t)
            later = None
            if causal:
                later = torch.ones((height, height), dtype=torch.bool, device=q_s.device).triu(1)
            for side in (scores_s, scores_t):
                if later is not None:
                    # Finite, and the same on both sides: its probability is 0 and its log ratio no 0 * inf.
                    side[:, :, start:].masked_fill_(later, torch.finfo(side.dtype).min / 4)
                # A token's score with itself is often far above all others, and more so in the wider model: without
                # the maxima, the small divergence of such a row would be a difference of large numbers.
                side.sub_(side.amax(-1, keepdim=True))
            grad = scores_s.view(-1, columns)
            kd, _ = kd_rows(
                grad,
                scores_t.view(-1, columns),
                None,
                RowTerms(),
                row_weight=None if weight is None else weight[here].repeat(shape[0]),
                grad=None if gradients is None else grad,
            )
            values[here] += kd.view(shape[:2]).sum(0)
            if gradients is not None:
                torch.bmm(scores_s, k_s[maps, :columns], out=gradients[0][maps, here])
                gradients[1][maps, :columns].baddbmm_(scores_s.transpose(1, 2), q_s[maps, here])
    return values


def relation_rows(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None,
    heads: tuple[int, int],
    causal: bool,
    *,
    row_weight: Tensor | None = None,
    needs: tuple[bool, bool] = (False, False),
    statistics: object = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], None]:
    """Sums over heads (B, N) of the rows' divergences, and the gradients of the student's queries and keys.

    The contract is `core.backend.Backend.relation_rows`. Nothing is kept from the values to the gradients: both
    come from the same scores.
    """
    batch, length, width = student[0].shape
    wide, pairs = accum_dtype(student[0].dtype), max(heads)
    to_itself = student[1] is student[0]
    values = torch.zeros((batch, length), dtype=wide, device=student[0].device)
    d_q, d_k = (
        torch.zeros(side.shape, dtype=wide, device=side.device) if need else None
        for side, need in zip(student, needs, strict=True)
    )
    indices = _indices(mask)
    for sequence in range(batch):
        index = None if indices is None else indices[sequence]
        sides = []
        for (q, k), count in ((student, heads[0]), (teacher, heads[1])):
            keys = _split(k[sequence], index, count, pairs, wide)
            queries = keys if q is k else _split(q[sequence], index, count, pairs, wide)
            sides.append((queries / math.sqrt(queries.shape[2]), keys))
        parts = weight = None
        if any(needs):
            parts = torch.empty_like(sides[0][0]), torch.zeros_like(sides[0][1])
        if row_weight is not None:
            weight = row_weight[sequence] if index is None else row_weight[sequence].index_select(0, index)
        rows = _solve_sequence(sides[0], sides[1], causal, weight, parts)
        values[sequence] = rows if index is None else values[sequence].index_copy(0, index, rows)
        if parts is None:
            continue
        parts[0].div_(math.sqrt(width // heads[0]))
        if to_itself:
            parts[0].add_(parts[1])
        for part, total in zip(parts, (d_q, d_k), strict=True):
            if total is not None:
                _join(part, index, heads[0], total[sequence])
    return values, (d_q, d_k), None
