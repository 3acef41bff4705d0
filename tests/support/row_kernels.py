"""The Triton row kernel held to the budget against `reference` in fp64.

A block of 64 columns stands in for the real ones, so that few columns already make several tiles and a ragged tail.
"""

from typing import Any

import torch
from torch import Tensor

from kdkernels._triton.kd.rows import kd_rows
from kdkernels._triton.launch import RowConfig
from kdkernels.divergences import (
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
from kdkernels.options import RowTerms
from kdkernels.reference.logits import kd_row_terms
from tests.support.budget import assert_within_budget
from tests.support.rounding import Truth, truths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = RowConfig(block=64, width=8, num_warps=1)
ROWS = 3
DIVERGENCES: list[Divergence] = [
    ForwardKL(),
    ReverseKL(),
    JSD(0.3),
    SkewKL(0.2),
    SkewReverseKL(0.2),
    TVD(),
    AlphaBeta(0.3, 0.6),
    ChiSquared(),
    Renyi(0.6),
    Renyi(2.0),
    Decoupled(),
]

# Those that tiles of the vocabulary take.
TILED = [divergence for divergence in DIVERGENCES if divergence.properties.adds_over_tiles]


def name(value: object) -> str:
    """An id of a test's parameter: objects by what they are, without their addresses."""
    return "Decoupled()" if isinstance(value, Decoupled) else repr(value)


def options_for(divergence: Divergence) -> dict[str, Any]:
    """What a call needs beside the terms: two weights of each row iff the divergence is decoupled."""
    if not isinstance(divergence, Decoupled):
        return {}
    target, rest = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.25, 1.0]], device=DEVICE)
    return {"decoupled": (target, rest)}


def inputs(vocabulary: int, dtype: torch.dtype = torch.float32, teacher_dtype: torch.dtype | None = None):
    """Student, teacher and labels of a few rows; the student stands away from zero."""
    student = (torch.randn(ROWS, vocabulary, device=DEVICE) * 2 + 3).to(dtype)
    teacher = (torch.randn(ROWS, vocabulary, device=DEVICE) * 2).to(teacher_dtype or dtype)
    return student, teacher, torch.randint(0, vocabulary, (ROWS,), device=DEVICE)


def reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    weight: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Row losses and their weighted gradient by autograd, with everything in float64."""
    student = student.detach().double().requires_grad_()
    weight = None if weight is None else weight.double()
    divergence, cross_entropy = kd_row_terms(student, teacher.double(), labels, weight, terms, **options)
    losses = terms.kd_scale * divergence + terms.ce_weight * cross_entropy
    (losses if weight is None else losses * weight).sum().backward()
    assert student.grad is not None
    return losses.detach(), student.grad


def true_rows(*arguments: Any, **options: Any) -> tuple[Truth, ...]:
    """`reference` with the error that float32 has to expect."""
    return truths(lambda: reference(*arguments, **options))


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,
    vocab_map: int | Tensor | None = None,
    config: RowConfig = SMALL,
) -> Tensor:
    """Run the kernel, in place when no `grad` is given, and hold losses and gradient to the budget; the gradient."""
    exact_student = student.double() + (0.0 if student_bias is None else student_bias.double())
    exact_teacher = teacher.double() + (0.0 if teacher_bias is None else teacher_bias.double())
    # -inf has no gradient in eager code (0 * inf); -1e5 has the same probability and has one.
    exact_student, exact_teacher = exact_student.clamp(min=-1e5), exact_teacher.clamp(min=-1e5)
    options: dict[str, Any] = options_for(terms.divergence) | {"vocab_map": vocab_map}
    truth = true_rows(exact_student, exact_teacher, labels, terms, row_weight, **options)
    written = student if grad is None else grad
    kd, ce = kd_rows(
        student,
        teacher,
        labels,
        terms,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        row_weight=row_weight,
        grad=written,
        config=config,
        **options,
    )
    assert kd.dtype == ce.dtype == torch.float32
    assert_within_budget(terms.kd_scale * kd + terms.ce_weight * ce, truth[0], "row losses")
    assert_within_budget(written, truth[1], "gradient")
    return written
