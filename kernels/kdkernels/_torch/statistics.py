"""Entropies, probabilities of the label and agreement of a block of rows, at temperature 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import exponentiate, shift, weighted_sum


def write_statistics(
    student: Tensor,  # (R, V_s) logits
    teacher: Tensor,  # (R, V_t) logits
    labels: Tensor | None,  # (R, 1)
    position: Tensor | None,  # (V_s,) place of a student's id among the shared ones, -1 without one
    columns_t: Tensor | None,  # (shared,) the teacher's ids of the shared ones
    shared: int,  # without `position`: ids below are shared
    scratch: tuple[Tensor, ...],  # two buffers at least as wide as both vocabularies
    out: Tensor,  # (R, 5)
) -> None:
    """Fill `out` in the order of `kdkernels.KDStats` after its first two."""
    best_s, best_t = student.argmax(-1, keepdim=True), teacher.argmax(-1, keepdim=True)
    labels_t = labels
    if position is not None and columns_t is not None:
        best_s = _teacher_ids(best_s, position, columns_t)
        labels_t = None if labels is None else _teacher_ids(labels, position, columns_t)
    elif labels is not None and shared < student.shape[1]:
        labels_t = labels.masked_fill(labels >= shared, -1)
    out[:, 0:1], out[:, 3:4] = _entropy_and_probability(student, labels, scratch)
    out[:, 1:2], out[:, 2:3] = _entropy_and_probability(teacher, labels_t, scratch)
    out[:, 4:5] = best_s == best_t


def _teacher_ids(ids: Tensor, position: Tensor, columns_t: Tensor) -> Tensor:
    """The teacher's ids of student ids, -1 where it has none."""
    place = position[ids]
    return columns_t[place.clamp_min(0)].masked_fill(place < 0, -1)


def _entropy_and_probability(
    logits: Tensor, labels: Tensor | None, scratch: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(R, 1) each; the probability is NaN without a label."""
    log, exp = (buffer[:, : logits.shape[1]] for buffer in scratch)
    log = shift(logits, log)
    total, weighted = (torch.empty_like(logits[:, :1]) for _ in range(2))
    exponentiate(log, exp, total)
    log_total = total.log()
    probability = torch.full_like(total, math.nan)
    if labels is not None:
        probability = (
            (log.gather(1, labels.clamp_min(0)) - log_total).exp_().masked_fill_(labels < 0, math.nan)
        )
    weighted_sum(exp, log, True, exp, weighted)
    return log_total - weighted / total, probability
