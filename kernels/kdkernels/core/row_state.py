"""What is known of a row of logits between two tiles of its vocabulary: one (SLOTS, R) tensor that both back ends read.

Logits z are after bias and transform. A tile without a teacher changes neither the student's nor the teacher's maximum and sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Online maxima of z and sums of exp((z - maximum) / T) over the shared columns, for Decoupled without the label's; last
# the cross entropy's, at temperature 1 over all of the student's columns. Slots that ranks reduce together are neighbours.
STUDENT_MAX, TEACHER_MAX, CE_MAX = 0, 1, 2
STUDENT_SUM, TEACHER_SUM, CE_SUM = 3, 4, 5
# z of the label, 0 until its tile was seen; the teacher's for Decoupled, +inf where the label's tile has no teacher.
LABEL, TEACHER_LABEL = 6, 7
# Sum of z over all of the student's columns, for label smoothing.
LOGIT_SUM = 8
# Second pass: the value of the divergence (of Decoupled that of the distributions without the label), and the mean
# slope <f>, up to the constant that the back end's f leaves out; UNCENTRED_MEAN is skew KL's without that constant, and for
# TVD the sum of p_s.
VALUE, MEAN, UNCENTRED_MEAN = 9, 10, 11
SLOTS = 12


@dataclass(frozen=True, eq=False)
class Tile:
    """Columns [offset, offset + C) of the logits of some rows, as they leave their GEMM."""

    student: Tensor  # (R, C)
    teacher: Tensor | None  # (R, C) the same ids; None where the teacher shares none of them
    labels: Tensor | None  # (R,) int64 ids of the whole vocabulary
    offset: int = 0
    student_bias: Tensor | None = None  # (C,)
    teacher_bias: Tensor | None = None  # (C,)
    row_weight: Tensor | None = (
        None  # (R,) multiplies gradients; rows of weight 0 keep their state and get exact zeros
    )


def new_state(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(SLOTS, R) of rows of which nothing was seen."""
    state = torch.zeros((SLOTS, rows), dtype=dtype, device=device)
    state[STUDENT_MAX : CE_MAX + 1].fill_(-math.inf)  # a list as an index would be copied from the host
    return state


def rescale(total: Tensor, maximum: Tensor, after: Tensor, temperature: float) -> Tensor:
    """Sums of exponentials relative to `maximum`, as sums relative to `after`; nothing but -inf leaves 0."""
    return total * ((maximum - finite_or_zero(after)) / temperature).exp()


def finite_or_zero(maximum: Tensor) -> Tensor:
    """The reference of exponents: the maximum, 0 for a row of nothing but -inf, as -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)
