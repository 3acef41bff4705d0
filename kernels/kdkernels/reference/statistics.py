"""The statistics of `return_stats`, for every back end: entropies, probabilities of the label, agreement of two models.

They have no gradient, so one function on logits is the specification and what runs. It takes a few rows at a time: beside
the logits it holds three of their size for that many rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.rows import ids_in_range
from ..options import LogitTransform, RowTerms
from .logits import transformed, wide

# Logits of one side looked at together, on a CPU (1 MiB in float32, which stays in its caches) and elsewhere.
ELEMENTS, DEVICE_ELEMENTS = 1 << 18, 1 << 24


@torch.no_grad()
def row_statistics(
    student_logits: Tensor,  # (N, V_s), before bias and transform
    teacher_logits: Tensor,  # (N, V_t), likewise
    labels: Tensor | None,  # (N,), read only in rows whose weight is not 0
    weight: Tensor | None,  # (N,)
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    vocab_map: int | Tensor | None = None,
) -> Tensor:
    """(5, N) what `KDStats` holds after the two losses, of the models' own distributions at temperature 1."""
    rows, vocabulary = student_logits.shape
    if labels is not None and weight is not None:
        labels = labels.masked_fill(weight == 0, 0)
    elements = ELEMENTS if student_logits.device.type == "cpu" else DEVICE_ELEMENTS
    size = max(1, elements // max(vocabulary, teacher_logits.shape[1]))
    found = [
        _block_statistics(
            _logits(student_logits[here], student_bias, terms.student_transform),
            _logits(teacher_logits[here], teacher_bias, terms.teacher_transform),
            None if labels is None else labels[here],
            vocab_map,
        )
        for here in (slice(start, start + size) for start in range(0, rows, size))
    ]
    statistics = torch.cat(found, 1) if found else wide(student_logits).new_zeros((5, 0))
    return statistics if weight is None else statistics.masked_fill_(weight == 0, 0.0)


def _logits(output: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    output = wide(output)
    return transformed(output if bias is None else output + bias.to(output.dtype), transform)


def _block_statistics(
    student: Tensor, teacher: Tensor, labels: Tensor | None, vocab_map: int | Tensor | None
) -> Tensor:
    best, teacher_labels = student.argmax(-1), labels
    if isinstance(vocab_map, Tensor):
        best = vocab_map[best]
        if labels is not None:
            ids, outside = ids_in_range(labels, student.shape[1])
            teacher_labels = vocab_map[ids].masked_fill(outside, -1)
    elif vocab_map is not None and labels is not None:
        teacher_labels = labels.masked_fill(labels >= vocab_map, -1)
    agrees = best == teacher.argmax(-1)
    student_entropy, student_target = _entropy_and_probability(student, labels)
    teacher_entropy, teacher_target = _entropy_and_probability(teacher, teacher_labels)
    numbers = (student_entropy, teacher_entropy, teacher_target, student_target, agrees)
    return torch.stack([number.to(student.dtype) for number in numbers])


def _entropy_and_probability(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N,) each; the probability is NaN without a label, and for one that is no id of this model."""
    largest = logits.amax(-1, keepdim=True)
    shifted = logits - largest.masked_fill(largest == -math.inf, 0.0)
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    probability = torch.full_like(total, math.nan)
    if labels is not None:
        ids, outside = ids_in_range(labels, logits.shape[1])
        probability = exponentials.gather(1, ids.unsqueeze(1)).squeeze(1) / total
        probability = probability.masked_fill(outside, math.nan)
    # Entries of probability 0 may have a logarithm of -inf.
    weighted = exponentials.mul_(shifted.masked_fill_(exponentials == 0, 0.0)).sum(-1)
    return total.log() - weighted / total, probability
