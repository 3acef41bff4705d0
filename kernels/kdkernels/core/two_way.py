"""A label against all other entries: the two-way distributions of student and teacher, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class TwoWay:
    """From the label's logarithm and the sum of the others' exponentials, measured from one zero, of both sides.

    What is left of 1 is never computed as 1 - p, so both entries have all their digits when the label has nearly everything.
    """

    def __init__(self, label_s: Tensor, others_s: Tensor, label_t: Tensor, others_t: Tensor) -> None:
        self.label_s, self.rest_s = _split(label_s, others_s)
        self.label_t, self.rest_t = _split(label_t, others_t)

    def divergence(self) -> Tensor:
        """KL(teacher ‖ student)."""
        p, r = self.label_t.exp(), self.rest_t.exp()
        label = (p * (self.label_t - self.label_s)).masked_fill(p == 0, 0.0)
        return label + (r * (self.rest_t - self.rest_s)).masked_fill(r == 0, 0.0)

    def gap(self) -> Tensor:
        """p_t[label] - p_s[label], from whichever of the two entries is the smaller."""
        p_s, p_t = self.label_s.exp(), self.label_t.exp()
        return torch.where(p_s + p_t > 1.0, self.rest_s.exp() - self.rest_t.exp(), p_t - p_s)


def _split(label: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    label, log_rest = label.double(), others.double().log()
    total = torch.logaddexp(label, log_rest)
    return label - total, log_rest - total
