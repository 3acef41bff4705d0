"""A few rows at once, for which a call into torch costs as much as its numbers: plain log-softmaxes and closed gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import JSD, ForwardKL, ReverseKL
from ..options import RowTerms


def few_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    row_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """The weighted loss and its gradient; the contract is `core.backend.FewRows`."""
    divergence = terms.divergence
    if type(divergence) not in (ForwardKL, ReverseKL, JSD):
        return None
    log_s, log_t = student_logits, teacher_logits
    tempered = terms.temperature != 1.0
    if tempered:
        log_s, log_t = log_s * (1.0 / terms.temperature), log_t * (1.0 / terms.temperature)
    log_s, log_t = torch.log_softmax(log_s, -1), torch.log_softmax(log_t, -1)
    log_one = log_s
    if labels is not None and tempered:
        log_one = torch.log_softmax(student_logits, -1)

    # Values, and into `gradient` that of the divergence with respect to logits / T.
    gradient = None
    p_t = log_t.exp()
    if isinstance(divergence, ForwardKL):
        loss = (log_t - log_s).mul_(p_t).sum()
        if with_gradient:
            gradient = log_s.exp().sub_(p_t)
    else:
        p_s, other, share = log_s.exp(), log_t, 0.0
        if isinstance(divergence, JSD):
            share = divergence.beta
            other = torch.lerp(p_s, p_t, share).log_()  # the mixture's
        ratio = (log_s - other).mul_(p_s)
        mean = ratio.sum(-1, keepdim=True)
        loss = mean.sum()
        if isinstance(divergence, JSD):
            loss.mul_(1.0 - share).add_(log_t.sub_(other).mul_(p_t).sum(), alpha=share)
        if with_gradient:
            gradient = ratio.addcmul_(p_s, mean, value=-1.0)
            if share:
                gradient.mul_(1.0 - share)

    loss.mul_(terms.kd_scale * row_weight)
    if labels is not None:
        loss.add_(F.nll_loss(log_one, labels, reduction="sum"), alpha=terms.ce_weight * row_weight)
    # An infinite logit, or a row far outside of the range of exp: `kd_rows` knows what is 0 there.
    if not math.isfinite(loss.item()):
        return None
    if gradient is not None:
        gradient.mul_(terms.kd_scale / terms.temperature * row_weight)
        if labels is not None:
            of_ce = terms.ce_weight * row_weight
            gradient.add_(log_one.exp_(), alpha=of_ce)
            gradient.scatter_(1, labels.unsqueeze(1), -of_ce, reduce="add")
    return loss, gradient
