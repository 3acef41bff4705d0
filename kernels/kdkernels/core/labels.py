"""What a row needs of its label: the smoothed cross entropy, and the binary distributions (label, non-target classes)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .row_state import (
    LABEL,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_LABEL,
    TEACHER_MAX,
    TEACHER_SUM,
    finite_or_zero,
)


def target_shares(smoothing: float, vocabulary: int) -> tuple[float, float]:
    """The smoothed one-hot target: 1 - e at the label, and e / V at every entry."""
    return 1.0 - smoothing, smoothing / vocabulary


def cross_entropy(log_sum: Tensor, label: Tensor, mean: Tensor | None, smoothing: float) -> Tensor:
    """log sum exp(s) - (1 - e) s_label - e mean(s), of the shape of `log_sum`.

    The three numbers of a row are relative to one reference, such as its largest logit; without smoothing `mean` is None.
    """
    value = log_sum - (1.0 - smoothing) * label
    return value if mean is None else value - smoothing * mean


class BinaryKL:
    """KL of the binary distributions (label, non-target classes) of teacher and student, in float64.

    Of each side the logarithm of the label and the sum of the other exponentials, relative to one reference. The non-target
    probability is never 1 - p, so both entries have all their digits when the label has nearly everything.
    """

    def __init__(self, label_s: Tensor, others_s: Tensor, label_t: Tensor, others_t: Tensor) -> None:
        self.label_s, self.rest_s = _split(label_s, others_s)
        self.label_t, self.rest_t = _split(label_t, others_t)

    @staticmethod
    def of_state(state: Tensor, temperature: float) -> BinaryKL:
        """From the state of rows (`row_state`); a label that is not shared has probability 0."""
        return BinaryKL(*label_terms(state, temperature))

    def divergence(self) -> Tensor:
        """KL(teacher ‖ student)."""
        p, r = self.label_t.exp(), self.rest_t.exp()
        label = (p * (self.label_t - self.label_s)).masked_fill(p == 0, 0.0)
        return label + (r * (self.rest_t - self.rest_s)).masked_fill(r == 0, 0.0)

    def target_difference(self) -> Tensor:
        """p_t[label] - p_s[label], from whichever of the two entries is the smaller."""
        p_s, p_t = self.label_s.exp(), self.label_t.exp()
        return torch.where(p_s + p_t > 1.0, self.rest_s.exp() - self.rest_t.exp(), p_t - p_s)


def label_terms(state: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `BinaryKL`, (R,) each, from the state of rows."""
    absent = state[TEACHER_LABEL] == math.inf
    terms = []
    for label, largest, total in (
        (LABEL, STUDENT_MAX, STUDENT_SUM),
        (TEACHER_LABEL, TEACHER_MAX, TEACHER_SUM),
    ):
        terms += [
            ((state[label] - finite_or_zero(state[largest])) / temperature).masked_fill(absent, -math.inf),
            state[total],
        ]
    return terms[0], terms[1], terms[2], terms[3]


def _split(label: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    label, log_rest = label.double(), others.double().log()
    total = torch.logaddexp(label, log_rest)
    return label - total, log_rest - total
