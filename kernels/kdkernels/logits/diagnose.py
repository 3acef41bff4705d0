"""`check_finite=True`: find the first row that makes a loss NaN or infinite, and the side that does."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.compiling import is_tracing
from ..reference.logits import linear
from ..teachers import TeacherCrossTerm, TeacherHead, TeacherLogits, TeacherTopK
from .problem import Problem

# Elements of logits that are looked at together.
LOOK_AT = 1 << 24


def _bad_rows(logits: Tensor) -> Tensor:
    """(R,) True where a row has no softmax: a NaN, a +inf, or -inf everywhere."""
    return ~torch.isfinite(logits.amax(-1))


def _bad_teacher_rows(problem: Problem, rows: slice) -> Tensor:
    """(R,) the same of the teacher, in whatever form it was given; False where it was not read."""
    teacher = problem.teacher
    if not problem.terms.reads_teacher(problem.return_stats):
        return problem.counted.denominator.new_zeros((), dtype=torch.bool)
    if isinstance(teacher, TeacherLogits):
        return _bad_rows(teacher.logits[rows])
    if isinstance(teacher, TeacherHead):
        return _bad_rows(linear(teacher.hidden[rows], teacher.weight, teacher.bias))
    if isinstance(teacher, TeacherTopK):
        return _bad_rows(teacher.logprobs[rows])
    assert isinstance(teacher, TeacherCrossTerm)
    return ~torch.isfinite(
        teacher.cross[rows].abs().sum(-1) + teacher.bias[rows].abs() + teacher.entropy[rows]
    )


@torch.no_grad()
def refuse_bad_rows(
    problem: Problem, loss: Tensor, source: Tensor, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Raise when the loss is not finite; `source` is student logits (N, V), or hidden states with `weight`."""
    if is_tracing():
        raise ValueError(
            "check_finite=True reads the loss back, which a compiled graph cannot; leave it at False there"
        )
    if bool(torch.isfinite(loss).all()):
        return
    vocabulary = source.shape[1] if weight is None else weight.shape[0]
    size = max(1, LOOK_AT // vocabulary)
    counts = problem.counted.weight
    for start in range(0, source.shape[0], size):
        rows = slice(start, start + size)
        student = source[rows] if weight is None else linear(source[rows], weight, bias)
        valid = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
        if counts is not None:
            valid = counts[rows] != 0
        student_bad, teacher_bad = _bad_rows(student) & valid, _bad_teacher_rows(problem, rows) & valid
        bad = student_bad | teacher_bad
        if not bool(bad.any()):
            continue
        row = int(bad.to(torch.uint8).argmax())
        sides = [
            name for name, side in (("student", student_bad), ("teacher", teacher_bad)) if bool(side[row])
        ]
        raise FloatingPointError(
            f"row {start + row} has no finite softmax for the {' and the '.join(sides)}: its logits hold a NaN or a +inf, "
            "or nothing but -inf; earlier rows are fine. Look for overflow in the layers before, or for a learning "
            "rate that is too high"
        )
    value = float(loss[~torch.isfinite(loss)].flatten()[0])
    target, non_target = problem.decoupled or (None, None)
    for name, given in (
        ("token_weight", counts),
        ("Decoupled.target", target),
        ("Decoupled.non_target", non_target),
    ):
        if given is None:
            continue
        wrong = given if counts is None else given[counts != 0]
        wrong = wrong[~torch.isfinite(wrong)]
        if wrong.numel():
            what = "a NaN" if bool(wrong[0].isnan()) else "an infinity"
            raise FloatingPointError(f"{name} holds {what} in a valid row")
    divergence = problem.terms.divergence
    cause = "the weights or the logits are too large for float32"
    if divergence.properties.may_be_infinite:
        cause = (
            f"{divergence!r} is infinite where one side has probability 0 and the other has not; use jsd or a skew, or "
            "keep -inf out of the logits"
        )
    raise FloatingPointError(
        f"the loss is {value} although all valid rows have finite logits or -inf: {cause}"
    )
