"""What `return_stats=True` gives beside the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import Reduction


class KDStats(NamedTuple):
    """Numbers of every token, shape (...) each, float32 (float64 for float64 inputs), detached; 0 in masked rows.

    `kd` and `ce` are the two parts of the loss without their weights and without T squared. The others are of the models'
    own distributions: at temperature 1, after scale and softcap, each over its whole vocabulary.
    """

    kd: Tensor
    """The divergence at temperature T, over the shared ids."""

    ce: Tensor
    """The cross entropy with its label smoothing; 0 when ce_weight is 0."""

    student_entropy: Tensor
    """In nats."""

    teacher_entropy: Tensor
    """In nats."""

    teacher_target_prob: Tensor
    """The teacher's probability of the label; NaN without labels, or for a label that it does not have."""

    student_target_prob: Tensor
    """The student's probability of the label; NaN without labels."""

    agrees: Tensor
    """1 where both give their largest probability to the same id, else 0."""


def stats_from_rows(rows: Tensor, shape: tuple[int, ...]) -> KDStats:
    """(7, N) as `KDStats` of the given shape."""
    return KDStats(*(row.reshape(shape) for row in rows.detach().unbind()))


def in_shape(
    loss: Tensor, statistics: Tensor | None, leading: torch.Size, reduction: Reduction
) -> Tensor | tuple[Tensor, KDStats]:
    """The loss in its shape, with the statistics if return_stats is True."""
    loss = loss.reshape(leading) if reduction == "none" else loss
    return loss if statistics is None else (loss, stats_from_rows(statistics, leading))
