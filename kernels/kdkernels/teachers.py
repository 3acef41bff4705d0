"""The forms in which a teacher can be given. The teacher is frozen: no gradient ever reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Teacher logits (..., V) at temperature 1. A plain tensor means the same."""

    logits: Tensor


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """Teacher hidden states (..., D_t), head weight (V, D_t) and bias (V,): logits = hidden @ weight.T + bias.

    The logits are computed chunk by chunk and never stored whole. D_t may differ from the student's D_s.
    `softcap` and `scale` other than their defaults are not supported yet.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The K kept teacher entries of each token: log-probabilities and indices (..., K). Not supported yet."""

    logprobs: Tensor
    indices: Tensor
    tail: Literal["renormalize", "bucket"] = "renormalize"


Teacher = Tensor | TeacherLogits | TeacherHead | TeacherTopK
