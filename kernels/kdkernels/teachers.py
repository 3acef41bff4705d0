"""The forms in which a teacher can be given. The teacher is frozen: no gradient ever reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Tail = Literal["renormalize", "bucket"]
# The probability of a teacher's bucket, unless every id was kept.
MIN_BUCKET_PROB = 2.0**-24


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Teacher logits (..., V_t) at temperature 1, as they go into its softmax. A plain tensor means the same."""

    logits: Tensor


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """Teacher hidden states (..., D_t), head weight (V_t, D_t) and bias (V_t,).

    The logits are softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), or scale * (...) without a softcap.
    They are computed chunk by chunk and never stored whole. D_t may differ from the student's D_s.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The teacher's K top-k entries of each token: log-probabilities and ids (..., K), in any order.

    The log-probabilities are those of the teacher's whole distribution at temperature 1; an entry of -inf is one that
    was not kept. `indices` are int64 ids without repetition. `tail` says what stands for the entries that were not kept:

    - "renormalize": nothing. p_t is softmax(logprobs / T) over the listed entries and 0 elsewhere.
    - "bucket": one category. On both sides all other ids become one entry, at temperature 1, with the rest of
      the probability; both distributions over K + 1 categories are then brought to temperature T (p^(1/T), normalised).
      The teacher's is 2^-24 at least: less cannot be distinguished from 0 in float32, and 0 would make reverse KL infinite.
    """

    logprobs: Tensor
    indices: Tensor
    tail: Tail = "renormalize"


@dataclass(frozen=True, eq=False)
class TeacherCrossTerm:
    """What forward KL needs to know of the teacher when the student's head is frozen; see `teacher_cross_term`.

    With c = p_t W_s, KL(p_t ‖ p_s) = log sum exp(s / T) - (hidden . c + p_t . b_s) scale / T - entropy. So a step needs
    neither the teacher nor its head: as many numbers per token as the student is wide stand for it.
    """

    cross: Tensor
    """(..., D_s), the student's head averaged under the teacher: p_t @ student_weight."""

    bias: Tensor
    """(...), the student's bias averaged under the teacher; 0 without one."""

    entropy: Tensor
    """(...), of the teacher at `temperature`, in nats."""

    temperature: float
    """At which p_t was taken: the loss has to be called with the same."""


FullTeacher = TeacherLogits | TeacherHead
CheckedTeacher = FullTeacher | TeacherTopK | TeacherCrossTerm
Teacher = Tensor | CheckedTeacher
