"""Relations of a position with the neighbours in its window: which there are, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["study", "official"]
Average = Literal["relations", "samples"]


@dataclass(frozen=True)
class RelationCounts:
    """What the means of one axis divide by: pairs (position, neighbour), and triples with two neighbours.

    0-D each; for a mean over samples (B,), each sample's own times the number of samples. At least 1 where there is nothing to divide, so that a loss in which nothing counts is a finite 0.
    """

    pairs: Tensor
    triples: Tensor


def count_relations(
    shape: tuple[int, int, int],  # (B, Q, M)
    valid: Tensor | None,  # (B, Q, M) bool
    window: int,
    variant: Variant,
    average: Average,
    device: torch.device,
    dtype: torch.dtype,
) -> RelationCounts:
    """Without `valid`, every position of the study's formula: neighbours outside the sequence count as well.

    With it, the relations of which every end exists and is valid; all of them in the official variant, which
    relates the pairs of a whole sequence. Nothing here is a host sync, but `compact_rows`.
    """
    batch, sequences, length = shape
    if valid is None and variant == "study":
        # Samples are all alike.
        neighbours = length if window >= length else 2 * window + 1
        rows = batch * sequences * length
        pairs, triples = (
            torch.full((), max(1, rows * neighbours**power), dtype=dtype, device=device) for power in (1, 2)
        )
        return RelationCounts(pairs, triples)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=device)
    before = torch.zeros((*shape[:2], length + 1), dtype=torch.int64, device=device)
    before[..., 1:] = valid.cumsum(-1)
    positions = torch.arange(length, device=device)
    first, last = (positions - window).clamp_min(0), (positions + window + 1).clamp_max(length)
    neighbours = (before[..., last] - before[..., first]) * valid
    pairs = before[..., -1] ** 2 if variant == "official" else neighbours.sum(-1)
    counts = (pairs.sum(1), (neighbours**2).sum((1, 2)))  # (B,) each
    if average == "samples":
        pairs, triples = (count.clamp_min(1) * batch for count in counts)
    else:
        pairs, triples = (count.sum().clamp_min(1) for count in counts)
    return RelationCounts(pairs.to(dtype), triples.to(dtype))
