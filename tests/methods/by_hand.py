"""Outputs of a classifier and its teacher, made by hand, for tests of one method's formula."""

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

    def __init__(self, layers: tuple[tuple[int, int], ...] = ((2, 4),), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.logits = draw(ROWS, CLASSES).requires_grad_()
        self.teacher_logits = 2 * draw(ROWS, CLASSES)
        self.labels = torch.arange(ROWS) % CLASSES
        self.labels[3] = IGNORED
        self.states = {ours: draw(ROWS, STUDENT.width).requires_grad_() for ours, _ in layers}
        self.teacher_states = {theirs: draw(ROWS, TEACHER.width) for _, theirs in layers}

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.logits, *self.states.values()]


def build(name: str, **options: Any) -> Method:
    """A method with these options."""
    kind = method_class(name)
    torch.manual_seed(0)
    return kind(kind.Options(**options), STUDENT, {"teacher": TEACHER})


def total(method: Method, rows: Rows, index: Tensor | None = None, step: Step | None = None) -> Tensor:
    """The weighted sum of all terms over the given rows of the batch, of which all others are shared."""
    step = Step() if step is None else step
    whole = torch.arange(ROWS)
    index = whole if index is None else index
    everything, known = outputs(rows, whole)
    batch = Batch(torch.zeros(ROWS, 1, dtype=torch.int64), rows.labels, whole)
    shared = {
        name: Shared(value.detach(), index)
        for name, value in method.share(step, batch, everything, {"teacher": known}).items()
    }
    student, teacher = outputs(rows, index)
    batch = Batch(torch.zeros(len(index), 1, dtype=torch.int64), rows.labels[index], index, whole=shared)
    terms = method.terms(step, batch, student, {"teacher": teacher})
    loss, _ = student.total(terms, method.weights(step), 1)
    return loss


def one_term(method: Method, rows: Rows, name: str, step: Step | None = None) -> Tensor:
    """The value of one term over the whole batch."""
    step = Step() if step is None else step
    whole = torch.arange(ROWS)
    student, known = outputs(rows, whole)
    batch = Batch(torch.zeros(ROWS, 1, dtype=torch.int64), rows.labels, whole)
    shared = {
        key: Shared(value.detach(), whole)
        for key, value in method.share(step, batch, student, {"teacher": known}).items()
    }
    batch = Batch(batch.input_ids, rows.labels, whole, whole=shared)
    term = method.terms(step, batch, student, {"teacher": known})[name]
    if isinstance(term, LogitTerm):
        return student.total({name: term}, {name: 1.0}, 1)[0]
    return term


def outputs(rows: Rows, index: Tensor) -> tuple[LogitOutputs, TeacherOutputs]:
    """Both sides of the given rows."""
    student = LogitOutputs(
        logits=rows.logits[index],
        labels=rows.labels[index],
        states={layer: value[index] for layer, value in rows.states.items()},
    )
    teacher = TeacherOutputs(
        target=TeacherLogits(rows.teacher_logits[index]),
        states={layer: value[index] for layer, value in rows.teacher_states.items()},
    )
    return student, teacher


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
