"""Outputs of a classifier and its teacher, made by hand, for tests of one method's formula."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdkernels import TeacherLogits
from kdtrain.methods import method_class
from kdtrain.methods.base import Method, Step
from kdtrain.models.loading import Shape
from kdtrain.outputs import IGNORED, Batch, LogitOutputs, LogitTerm, Shared, TeacherOutputs

STUDENT, TEACHER = Shape(layers=2, width=5), Shape(layers=4, width=7)
CLASSES, ROWS = 4, 9


class Rows:
    """Logits and states of both sides for all rows of a batch; leaves of the student have a gradient."""

    def __init__(
        self,
        layers: tuple[tuple[int, int], ...] = ((2, 4),),
        seed: int = 0,
        tokens: tuple[tuple[int, int], ...] = (),
        teacher_width: int = TEACHER.width,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.logits = draw(ROWS, CLASSES).requires_grad_()
        self.teacher_logits = 2 * draw(ROWS, CLASSES)
        self.labels = torch.arange(ROWS) % CLASSES
        self.labels[3] = IGNORED
        self.states = {ours: draw(ROWS, STUDENT.width).requires_grad_() for ours, _ in layers}
        self.teacher_states = {theirs: draw(ROWS, TEACHER.width) for _, theirs in layers}
        self.small_logits = 1.5 * draw(ROWS, CLASSES)
        """of a second teacher"""
        self.route = tuple("teacher" if row % 3 else "small" for row in range(ROWS))
        self.tokens = {ours: draw(ROWS, 6, STUDENT.width).requires_grad_() for ours, _ in tokens}
        self.teacher_tokens = {theirs: draw(ROWS, 8, teacher_width) for _, theirs in tokens}
        rows = torch.arange(ROWS)[:, None]
        self.mask, self.teacher_mask = (torch.arange(6) < 2 + rows % 5), (torch.arange(8) < 8 - rows % 4)

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.logits, *self.states.values(), *self.tokens.values()]


def build(name: str, **options: Any) -> Method:
    """A method with these options."""
    kind = method_class(name)
    torch.manual_seed(0)
    chosen = kind.Options(**options)
    return kind(chosen, STUDENT, dict.fromkeys(kind.teachers_of(chosen), TEACHER))


def total(method: Method, rows: Rows, index: Tensor | None = None, step: Step | None = None) -> Tensor:
    """The weighted sum of all terms over the given rows of the batch, of which all others are shared."""
    step = Step() if step is None else step
    whole = torch.arange(ROWS)
    index = whole if index is None else index
    everything, known = outputs(rows, whole)
    batch = Batch(torch.zeros(ROWS, 1, dtype=torch.int64), rows.labels, whole, route=rows.route)
    shared = {}
    for name, value in method.share(step, batch, everything, of(method, known)).items():
        # A statistic of the whole batch in one row, or a row for each row.
        places = index if len(value) == ROWS else torch.zeros(1, dtype=torch.int64)
        shared[name] = Shared(value.detach(), places)
    student, teachers = outputs(rows, index)
    route = tuple(rows.route[i] for i in index.tolist())
    ids = torch.zeros(len(index), 1, dtype=torch.int64)
    batch = Batch(ids, rows.labels[index], index, route=route, whole=shared)
    terms = method.terms(step, batch, student, of(method, teachers))
    loss, _ = student.total(terms, method.weights(step), 1)
    return loss


def one_term(method: Method, rows: Rows, name: str, step: Step | None = None) -> Tensor:
    """The value of one term over the whole batch."""
    step = Step() if step is None else step
    whole = torch.arange(ROWS)
    student, known = outputs(rows, whole)
    batch = Batch(torch.zeros(ROWS, 1, dtype=torch.int64), rows.labels, whole, route=rows.route)
    shared = {
        key: Shared(value.detach(), torch.arange(len(value)))
        for key, value in method.share(step, batch, student, of(method, known)).items()
    }
    term = method.terms(step, replace(batch, whole=shared), student, of(method, known))[name]
    if isinstance(term, LogitTerm):
        return student.total({name: term}, {name: 1.0}, 1)[0]
    return term


def of(method: Method, teachers: dict[str, TeacherOutputs]) -> dict[str, TeacherOutputs]:
    """The teachers that a method reads."""
    return {name: teachers[name] for name in method.teachers}


def outputs(rows: Rows, index: Tensor) -> tuple[LogitOutputs, dict[str, TeacherOutputs]]:
    """The student and both teachers on the given rows."""
    student = LogitOutputs(
        logits=rows.logits[index],
        labels=rows.labels[index],
        states={layer: value[index] for layer, value in rows.states.items()},
        tokens={layer: value[index] for layer, value in rows.tokens.items()},
        token_mask=rows.mask[index],
    )
    teacher = TeacherOutputs(
        target=TeacherLogits(rows.teacher_logits[index]),
        states={layer: value[index] for layer, value in rows.teacher_states.items()},
        tokens={layer: value[index] for layer, value in rows.teacher_tokens.items()},
        token_mask=rows.teacher_mask[index],
    )
    small = TeacherOutputs(target=TeacherLogits(rows.small_logits[index]))
    return student, {"teacher": teacher, "small": small}


def assert_split_changes_nothing(method: Method, rows: Rows, step: Step | None = None) -> None:
    """Value and gradients of two uneven micro-batches add up to those of the whole batch."""
    leaves = [*rows.leaves, *method.parameters()]
    whole = total(method, rows, step=step)
    expected = torch.autograd.grad(whole, leaves, allow_unused=True)
    parts = [
        total(method, rows, index, step)
        for index in (torch.tensor([6, 0, 3]), torch.tensor([1, 2, 4, 5, 7, 8]))
    ]
    torch.testing.assert_close(parts[0].detach() + parts[1].detach(), whole.detach())
    split = [torch.autograd.grad(part, leaves, allow_unused=True) for part in parts]
    for first, second, gradient in zip(*split, expected, strict=True):
        if gradient is None:
            assert first is None and second is None
        else:
            assert first is not None and second is not None
            torch.testing.assert_close(first + second, gradient, rtol=1e-4, atol=1e-5)
