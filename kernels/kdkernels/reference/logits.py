"""The specification of the losses between logits, as plain eager PyTorch in float32 (float64 for float64 inputs).

Autograd supplies the gradients. Nothing here is chunked or in place; a fast back end is right when
it agrees with this file. Other forms of a teacher are in `sparse.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.matmul import accum_dtype
from ..divergences import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    Divergence,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from ..options import LogitTransform, RowTerms


def wide(tensor: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor.to(accum_dtype(tensor.dtype))


def linear(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """hidden (..., D) @ weight (V, D).T + bias (V,) in float32 or float64."""
    out = wide(hidden) if weight is None else wide(hidden) @ wide(weight).transpose(0, 1)
    return out if bias is None else out + wide(bias)


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    """Logits after scale and softcap."""
    logits = logits * transform.scale if transform.scale != 1.0 else logits
    if transform.softcap is None:
        return logits
    return transform.softcap * torch.tanh(logits / transform.softcap)


def _expectation(p: Tensor, log_ratio: Tensor) -> Tensor:
    """sum p * log_ratio over the last axis; entries of weight 0 count as 0, whatever the ratio."""
    return (p * log_ratio.masked_fill(p == 0, 0.0)).sum(-1)


def divergence(log_p_s: Tensor, log_p_t: Tensor, kind: Divergence) -> Tensor:
    """D of two log-distributions (..., V), summed over the last axis; `Decoupled` has a function of its own."""
    p_s, p_t = log_p_s.exp(), log_p_t.exp()
    match kind:
        case ForwardKL():
            return _expectation(p_t, log_p_t - log_p_s)
        case ReverseKL():
            return _expectation(p_s, log_p_s - log_p_t)
        case JSD(beta):
            log_m = _log_mixture(p_t, p_s, beta)
            return beta * _expectation(p_t, log_p_t - log_m) + (1.0 - beta) * _expectation(
                p_s, log_p_s - log_m
            )
        case SkewKL(alpha):
            return _expectation(p_t, log_p_t - _log_mixture(p_t, p_s, alpha))
        case SkewReverseKL(alpha):
            return _expectation(p_s, log_p_s - _log_mixture(p_t, p_s, 1.0 - alpha))
        case TVD():
            return 0.5 * (p_t - p_s).abs().sum(-1)
        case AlphaBeta(alpha, beta):
            return _alpha_beta(log_p_s, log_p_t, alpha, beta)
        case ChiSquared():
            log_ratio = (log_p_t - log_p_s).masked_fill((p_t == 0) & (p_s == 0), 0.0)
            return ((p_t - p_s) * log_ratio.expm1()).sum(-1)
        case Renyi(alpha):
            log_product = alpha * log_p_t + (1.0 - alpha) * log_p_s
            return log_product.masked_fill(log_p_t == -math.inf, -math.inf).logsumexp(-1) / (alpha - 1.0)
        case _:
            raise NotImplementedError(f"the reference has no formula for {kind!r}")


def _log_mixture(p_t: Tensor, p_s: Tensor, share: float) -> Tensor:
    """log(share p_t + (1 - share) p_s).

    Clamped for entries in which both probabilities are 0: their ratios are not counted, but log(0) has no slope.
    """
    mixture = share * p_t + (1.0 - share) * p_s
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


def _alpha_beta(log_p_s: Tensor, log_p_t: Tensor, alpha: float, beta: float) -> Tensor:
    """The alpha-beta divergence; entries that both sides exclude count as 0."""
    neither = (log_p_s == -math.inf) & (log_p_t == -math.inf)
    log_p_s, log_p_t = log_p_s.masked_fill(neither, 0.0), log_p_t.masked_fill(neither, 0.0)

    def power(log_p: Tensor, exponent: float) -> Tensor:
        return torch.ones_like(log_p) if exponent == 0.0 else (exponent * log_p).exp()

    both = alpha + beta
    if alpha == 0.0 and beta == 0.0:
        terms = 0.5 * (log_p_t - log_p_s).square()
    elif both == 0.0:
        terms = (alpha * (log_p_s - log_p_t) + (alpha * (log_p_t - log_p_s)).exp() - 1.0) / alpha**2
    elif beta == 0.0:
        teacher = power(log_p_t, alpha)
        ratio = (alpha * (log_p_t - log_p_s)).masked_fill(teacher == 0, 0.0)
        terms = (teacher * ratio - teacher + power(log_p_s, alpha)) / alpha**2
    elif alpha == 0.0:
        student = power(log_p_s, beta)
        ratio = (beta * (log_p_s - log_p_t)).masked_fill(student == 0, 0.0)
        terms = (student * ratio - student + power(log_p_t, beta)) / beta**2
    else:
        product = power(log_p_t, alpha) * power(log_p_s, beta)
        ends = alpha / both * power(log_p_t, both) + beta / both * power(log_p_s, both)
        terms = (ends - product) / (alpha * beta)
    return terms.masked_fill(neither, 0.0).sum(-1)


def decoupled_divergence(
    log_p_s: Tensor,  # (N, V)
    log_p_t: Tensor,  # (N, V)
    is_label: Tensor,  # (N, V) bool; a row without a True has a label that both sides give nothing
    target: Tensor,  # (N,)
    non_target: Tensor,  # (N,)
) -> Tensor:
    """(N,) target * TKD + non_target * NCKD; a teacher that is certain of the label has an NCKD of 0."""

    def split(log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p[label], log(1 - p[label]) from the others, and the log-distribution over the others."""
        others = log_p.masked_fill(is_label, -math.inf)
        nothing = (others == -math.inf).all(-1)
        filled = others.masked_fill(nothing.unsqueeze(-1), 0.0)
        rest = filled.logsumexp(-1).masked_fill(nothing, -math.inf)
        label = log_p.masked_fill(~is_label, 0.0).sum(-1).masked_fill(~is_label.any(-1), -math.inf)
        return label, rest, F.log_softmax(filled, -1).masked_fill(nothing.unsqueeze(-1), -math.inf)

    label_s, rest_s, others_s = split(log_p_s)
    label_t, rest_t, others_t = split(log_p_t)
    two_s, two_t = torch.stack((label_s, rest_s), -1), torch.stack((label_t, rest_t), -1)
    target_kl = _expectation(two_t.exp(), two_t - two_s)
    return target * target_kl + non_target * _expectation(others_t.exp(), others_t - others_s)


def cross_entropy(logits: Tensor, labels: Tensor | None, terms: RowTerms) -> Tensor:
    """(N,) cross entropy at temperature 1 over the whole vocabulary; 0 where it has no weight."""
    if labels is None or terms.ce_weight == 0.0:
        return logits.new_zeros(logits.shape[0])
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=terms.label_smoothing)


def kd_row_terms(
    student_logits: Tensor,  # (N, V_s), before the transform
    teacher: Tensor,  # (N, V_t), before the transform
    labels: Tensor | None,  # (N,)
    weight: Tensor | None,  # (N,)
    terms: RowTerms,
    *,
    vocab_map: int | Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(N,) divergence and (N,) cross entropy, both without their weights; 0 in rows of weight 0."""
    masked = None if weight is None else weight == 0
    if masked is not None:
        # Masked rows may hold anything; replacing them first keeps NaN out of the gradient too.
        student_logits = student_logits.masked_fill(masked.unsqueeze(1), 0.0)
        teacher = teacher.masked_fill(masked.unsqueeze(1), 0.0)
        labels = None if labels is None else labels.masked_fill(masked, 0)
    student_logits = transformed(student_logits, terms.student_transform)
    shared_s, shared_t, columns = shared_logits(
        student_logits, transformed(teacher, terms.teacher_transform), vocab_map
    )
    log_p_s = F.log_softmax(shared_s / terms.temperature, -1)
    log_p_t = F.log_softmax(shared_t / terms.temperature, -1)
    if isinstance(terms.divergence, Decoupled):
        assert labels is not None and decoupled is not None
        kd = decoupled_divergence(log_p_s, log_p_t, columns == labels.unsqueeze(1), *decoupled)
    else:
        kd = divergence(log_p_s, log_p_t, terms.divergence)
    ce = cross_entropy(student_logits, labels, terms)
    return (kd, ce) if masked is None else (kd.masked_fill(masked, 0.0), ce.masked_fill(masked, 0.0))


def label_row_terms(
    student_logits: Tensor,  # (N, V), before the transform
    labels: Tensor | None,  # (N,)
    weight: Tensor | None,  # (N,)
    terms: RowTerms,
) -> tuple[Tensor, Tensor]:
    """What a loss with kd_weight 0 has instead of `kd_row_terms`: a divergence of 0 whatever the teacher is, and the cross entropy."""
    everywhere = torch.ones((), dtype=torch.bool, device=student_logits.device)
    zeros = student_logits.masked_fill(everywhere, 0.0).sum(1)  # 0 for NaN too, and part of the graph
    if labels is None or terms.ce_weight == 0.0:
        return zeros, zeros
    if weight is not None:
        masked = weight == 0
        student_logits, labels = (
            student_logits.masked_fill(masked.unsqueeze(1), 0.0),
            labels.masked_fill(masked, 0),
        )
    student_logits = transformed(student_logits, terms.student_transform)
    ce = cross_entropy(student_logits, labels, terms)
    return zeros, ce if weight is None else ce.masked_fill(weight == 0, 0.0)


def shared_logits(
    student: Tensor, teacher: Tensor, vocab_map: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits of the shared ids, (N, S) each, and the student's ids of these columns (S,)."""
    if isinstance(vocab_map, Tensor):
        columns = torch.nonzero(vocab_map >= 0).squeeze(1)
        return student.index_select(1, columns), teacher.index_select(1, vocab_map[columns]), columns
    shared = student.shape[1] if vocab_map is None else vocab_map
    columns = torch.arange(shared, device=student.device)
    return student[:, :shared], teacher[:, :shared], columns
