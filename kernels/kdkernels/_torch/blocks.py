"""One block of rows in preallocated scratch, and the steps that all divergences share.

A block is small enough that its scratch stays in the CPU's L2 cache, so every pass costs
arithmetic and little memory traffic. Everything is built from the two rows' unnormalised softmax:

    log_s = logits / T - shift    exp_s = exp(log_s)    sum_s = sum(exp_s)

so that p_s = exp_s / sum_s and log p_s = log_s - log sum_s; normalising is left to factors per row.
Values are sums of p times a log ratio, element by element: a difference of two log-sum-exps would
lose a small divergence in the rounding of two large numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.labels import target_shares


class Sums(NamedTuple):
    """Sums over the vocabulary and other numbers of a row, each (R, 1). Those that a divergence does not take stay 1."""

    exp_s: Tensor
    exp_t: Tensor
    exp_ce: Tensor  # of exp(student logits) at temperature 1, where that is another softmax
    first: Tensor  # what these three are is said by each divergence
    second: Tensor
    third: Tensor
    log_s: Tensor  # the logarithm of sum exp_s as it was rounded where a log ratio was normalised with it
    log_t: Tensor  # of sum exp_t, likewise
    label_s: Tensor  # the label's log_s and log_t, where the divergence splits the label off
    label_t: Tensor
    target: Tensor  # its weights, given
    non_target: Tensor


# The first fields are sums of exponentials, whose range says whether the logits may be used as they are; with the next
# three they have to be finite.
EXPONENTIAL_SUMS = 3
CHECKED_SUMS = 6


@dataclass(slots=True)
class Block:
    """R rows. `log_*` may be the caller's logits and are only read, unless `safe`; the rest is scratch, (R, V) each."""

    log_s: Tensor
    log_t: Tensor
    exp_s: Tensor
    exp_t: Tensor
    ratio: Tensor
    work: Tensor
    sums: Sums
    safe: bool  # logs are shifted copies; entries of probability 0 may be infinite: make 0 * inf = 0
    labels: Tensor | None = None  # (R, 1) columns of this block
    absent: Tensor | None = None  # (R, 1) True where the label is no column of this block
    mean: Tensor | None = None  # (R, 1), given for some of the columns: <f> over all of them

    @property
    def whole(self) -> bool:
        """The block has all columns; else its logs are normalised, and its sums are to be added to those of other blocks."""
        return self.mean is None

    def exponentiate_student(self) -> None:
        """exp_s and its sum, which stays 1 for a part of the columns."""
        torch.exp(self.log_s, out=self.exp_s)
        if self.whole:
            torch.sum(self.exp_s, -1, keepdim=True, out=self.sums.exp_s)

    def exponentiate_teacher(self) -> None:
        """exp_t and its sum, which stays 1 for a part of the columns."""
        torch.exp(self.log_t, out=self.exp_t)
        if self.whole:
            torch.sum(self.exp_t, -1, keepdim=True, out=self.sums.exp_t)


def shift(logits: Tensor, scratch: Tensor) -> Tensor:
    """Logits minus the maximum of their row, in scratch; a row of -inf only stays as it is."""
    largest = logits.amax(-1, keepdim=True)
    return torch.sub(logits, largest.masked_fill_(largest == -torch.inf, 0.0), out=scratch)


def exponentiate(log: Tensor, exp: Tensor, total: Tensor) -> None:
    """exp = exp(log), total = its row sums."""
    torch.exp(log, out=exp)
    torch.sum(exp, -1, keepdim=True, out=total)


def weighted_sum(exp: Tensor, log_ratio: Tensor, safe: bool, products: Tensor, total: Tensor) -> None:
    """total = row sums of exp * log_ratio; entries whose exp is 0 count as 0, also in log_ratio."""
    if safe:
        log_ratio.masked_fill_(exp == 0, 0.0)
    torch.sum(torch.mul(exp, log_ratio, out=products), -1, keepdim=True, out=total)


def subtract_target(
    grad: Tensor,
    factor: Tensor,
    labels: Tensor,
    smoothing: float,
    vocabulary: int,
    inside: Tensor | None = None,
) -> None:
    """grad (R, C) -= factor (R, 1) * the smoothed one-hot target; `inside` (R, 1): the label is one of these columns."""
    at_label, everywhere = target_shares(smoothing, vocabulary)
    if everywhere != 0.0:
        grad.sub_(factor * everywhere)
    own = -factor * at_label
    grad.scatter_add_(1, labels, own if inside is None else own.masked_fill(~inside, 0.0))
