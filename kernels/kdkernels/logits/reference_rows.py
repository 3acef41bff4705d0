"""A problem solved by the reference: every row's loss, by plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import logits as reference
from ..reference.sparse import cross_term_row_terms, top_k_row_terms
from ..reference.statistics import row_statistics
from ..teachers import TeacherCrossTerm, TeacherHead, TeacherTopK
from .problem import Problem


def cast_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in the dtype autocast asks for, if it does."""
    return tensor if dtype is None else tensor.to(dtype)


def reference_rows(problem: Problem, hidden: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Row losses (N,) and, where they are wanted, the statistics (7, N), by plain autograd.

    With kd_weight 0 the teacher is not read, unless for statistics: nothing it holds, a NaN or -inf, can reach the loss.
    """
    terms, labels, weight = problem.terms, problem.labels, problem.counted.weight
    statistics = None
    if not terms.reads_teacher(problem.return_stats):
        kd, ce = reference.label_row_terms(logits, labels, weight, terms)
    elif isinstance(problem.teacher, TeacherTopK):
        kd, ce = top_k_row_terms(logits, problem.teacher, labels, weight, terms)
    elif isinstance(problem.teacher, TeacherCrossTerm):
        assert hidden is not None
        kd, ce = cross_term_row_terms(hidden, logits, problem.teacher, labels, weight, terms)
    else:
        teacher = problem.teacher
        if isinstance(teacher, TeacherHead):
            cast = problem.autocast
            teacher = reference.linear(
                cast_to(teacher.hidden, cast), cast_to(teacher.weight, cast), teacher.bias
            )
        else:
            teacher = reference.wide(teacher.logits)
        teacher = teacher.to(logits.dtype)
        mapping = problem.vocab_map
        kd, ce = reference.kd_row_terms(
            logits, teacher, labels, weight, terms, vocab_map=mapping, decoupled=problem.decoupled
        )
        if problem.return_stats:
            others = row_statistics(logits, teacher, labels, weight, terms, vocab_map=mapping)
            statistics = torch.cat((kd.detach().unsqueeze(0), ce.detach().unsqueeze(0), others))
            if terms.kd_scale == 0.0:  # the gradient of an infinite divergence is NaN even with a weight of 0
                kd, ce = reference.label_row_terms(logits, labels, weight, terms)
    return terms.loss(kd, ce), statistics
