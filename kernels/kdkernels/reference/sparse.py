"""The specification for teachers that are given by a few numbers per token, in plain eager PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import RowTerms
from ..teachers import MIN_BUCKET_PROB, TeacherCrossTerm, TeacherTopK
from .logits import cross_entropy, divergence, transformed, wide


def _log_rest(log_p: Tensor, taken: Tensor) -> Tensor:
    """(N,) log of the probability that the entries that are not `taken` (N, V) have together."""
    others = log_p.masked_fill(taken, -math.inf)
    nothing = (others == -math.inf).all(-1)
    return others.masked_fill(nothing.unsqueeze(1), 0.0).logsumexp(-1).masked_fill(nothing, -math.inf)


def log_bucket(logprobs: Tensor, vocabulary: int) -> Tensor:
    """(N, 1) log of the probability that a teacher's top-k entries (N, K), float64, leave to the bucket."""
    rest = (1.0 - logprobs.exp().sum(1, keepdim=True)).clamp_min(MIN_BUCKET_PROB).log()
    # Where every id has an entry, the remainder is the rounding of the log-probabilities.
    every = (logprobs > -math.inf).sum(1, keepdim=True) == vocabulary
    return rest.masked_fill(every, -math.inf)


def top_k_row_terms(
    student_logits: Tensor,  # (N, V), before the transform
    teacher: TeacherTopK,  # (N, K)
    labels: Tensor | None,  # (N,)
    weight: Tensor | None,  # (N,)
    terms: RowTerms,
) -> tuple[Tensor, Tensor]:
    """(N,) divergence and (N,) cross entropy, both without their weights; 0 in rows of weight 0."""
    logprobs = wide(teacher.logprobs).to(student_logits.dtype)
    masked = None if weight is None else weight == 0
    if masked is not None:
        student_logits = student_logits.masked_fill(masked.unsqueeze(1), 0.0)
        logprobs = logprobs.masked_fill(masked.unsqueeze(1), 0.0)
        labels = None if labels is None else labels.masked_fill(masked, 0)
    logits = transformed(student_logits, terms.student_transform)
    if teacher.tail == "renormalize":
        log_p_s = F.log_softmax(logits / terms.temperature, -1)
        kept = F.log_softmax(logprobs / terms.temperature, -1)
        log_p_t = torch.full_like(log_p_s, -math.inf).scatter(1, teacher.indices, kept)
    else:
        # Entries of -inf were not kept: their ids belong to the tail.
        is_kept = logprobs > -math.inf
        log_p = F.log_softmax(logits, -1)
        taken = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, teacher.indices, is_kept)
        student = log_p.gather(1, teacher.indices).masked_fill(~is_kept, -math.inf)
        rest_s = _log_rest(log_p, taken).unsqueeze(1)
        # In float64: the rest may be as small as the rounding of a sum in float32.
        rest_t = log_bucket(logprobs.double(), log_p.shape[1]).to(log_p.dtype)
        log_p_s = F.log_softmax(torch.cat((student, rest_s), 1) / terms.temperature, -1)
        log_p_t = F.log_softmax(torch.cat((logprobs, rest_t), 1) / terms.temperature, -1)
    kd, ce = divergence(log_p_s, log_p_t, terms.divergence), cross_entropy(logits, labels, terms)
    return (kd, ce) if masked is None else (kd.masked_fill(masked, 0.0), ce.masked_fill(masked, 0.0))


def cross_term_row_terms(
    hidden: Tensor,  # (N, D_s)
    student_logits: Tensor,  # (N, V), before the scale
    teacher: TeacherCrossTerm,  # (N, D_s)
    labels: Tensor | None,  # (N,)
    weight: Tensor | None,  # (N,)
    terms: RowTerms,
) -> tuple[Tensor, Tensor]:
    """(N,) log sum exp(s / T) - <p_t, s> / T - entropy, and the cross entropy; 0 in rows of weight 0."""
    hidden, cross, bias, entropy = (
        wide(tensor).to(student_logits.dtype)
        for tensor in (hidden, teacher.cross, teacher.bias, teacher.entropy)
    )
    masked = None if weight is None else weight == 0
    if masked is not None:
        hidden, cross, student_logits = (
            tensor.masked_fill(masked.unsqueeze(1), 0.0) for tensor in (hidden, cross, student_logits)
        )
        labels = None if labels is None else labels.masked_fill(masked, 0)
    logits = transformed(student_logits, terms.student_transform)
    mean = ((hidden * cross).sum(-1) + bias) * terms.student_transform.scale
    kd = (logits / terms.temperature).logsumexp(-1) - mean / terms.temperature - entropy
    ce = cross_entropy(logits, labels, terms)
    return (kd, ce) if masked is None else (kd.masked_fill(masked, 0.0), ce.masked_fill(masked, 0.0))
