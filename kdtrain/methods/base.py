"""The interface of a method: one file says what it reads of the models, its terms, and what it does once per step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import MethodOptions

Pairs = tuple[tuple[int, int], ...]

T = TypeVar("T")

TASKS = frozenset({"classification", "code_lm", "masked_lm"})


@dataclass(frozen=True)
class Step:
    """Where a run is when it takes an optimizer step."""

    number: int = 0
    """0 is the first"""
    total: int = 1
    epoch: float = 0.0
    """passes over the rows so far"""
    seed: int = 0
    """of the run, for a method that draws"""

    @property
    def share(self) -> float:
        """0 at the first step, 1 at the last."""
        return self.number / max(1, self.total - 1)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method reads of the models."""

    live: bool = False
    """whether the teachers have to run now: stored outputs will not do"""
    layers: Pairs = ()
    """(student layer, teacher layer) of states, one for every position; 0 is the embeddings"""
    tokens: Pairs = ()
    """the same of the states of every token"""
    attention: Pairs = ()
    """the same of the inputs of attention"""
    whole_batch: bool = False
    """whether `share` is asked what micro-batches have to know of each other"""


class Generate(Protocol):
    """What a method that makes batches has of the run; every process has to call each equally often."""

    def __call__(self, sampler: Callable[[Any, Mapping[str, Any]], T], /) -> T:
        """Return what the sampler returns of the student, and the live teachers by name.

        It runs inside the wrapped forward and without grad.
        """
        ...

    def gather(self, values: Tensor, /) -> Tensor:
        """The rows (r, ...) of this micro-batch and of those of all other processes, in order; without fillers."""
        ...


class RunStudent(Protocol):
    """Runs a network of the student's kind on a micro-batch, as the student is run."""

    def __call__(self, network: nn.Module, batch: Batch, /) -> Outputs:
        """Its outputs, without states of layers."""
        ...


class Method(nn.Module):
    """One way to learn.

    Parameters train along with the student, buffers are checkpointed; neither is saved with the student. A subclass
    declares `Options` and implements `terms`; every other hook has a default that does nothing.
    """

    Options: ClassVar[type[MethodOptions]]
    tasks: ClassVar[frozenset[str]] = TASKS
    """tasks that can serve the method"""
    gradient_groups: tuple[tuple[str, ...], ...] = ()
    """groups of terms that get a gradient of their own, for `combine`; () for one gradient of all terms"""
    options: Any
    """what the recipe says, an instance of `Options`"""

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__()
        self.options = options
        self.teachers = tuple(teachers)

    @classmethod
    def teachers_of(cls, options: Any) -> tuple[str, ...]:
        """The names of the teachers that the method reads; () for labels alone."""
        return ("teacher",)

    def attach(self, student: nn.Module, run: RunStudent) -> None:
        """Called once with the student, before training; makes the parts that depend on more than its shape."""

    def needs(self) -> Needs:
        """What the method reads of the models."""
        return Needs()

    def weights(self, step: Step) -> dict[str, float]:
        """The weight of every term in this step, by name."""
        raise NotImplementedError

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """Every term that has a weight, of one micro-batch and inside the wrapped forward.

        A term is a sum over counted positions, a 0-D tensor or a term over logits. The objective multiplies it by the
        weight and divides the total once, by the counted positions of the whole batch.
        """
        raise NotImplementedError

    # ---- once per optimizer step, without grad, on all processes

    def score(self, step: Step, batch: Batch, student: Outputs) -> Tensor:
        """(B,) float32: a number for every row, before any teacher is asked; for `select`."""
        raise NotImplementedError

    def select(self, step: Step, rows: Tensor, scores: Tensor) -> Tensor:
        """The row numbers to train on, out of the (R,) rows of the whole batch and their scores (R,)."""
        return rows

    def make_batch(self, step: Step, batch: Batch, generate: Generate) -> Batch:
        """A micro-batch in place of this one, such as one sampled from the student. Needs live teachers, or none."""
        return batch

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """Tensors (r, ...) of which every micro-batch reads all rows of the whole batch, as `batch.whole[name]`."""
        return {}

    # ---- once per step or evaluation; values are reduced over micro-batches and processes

    def combine(
        self, step: Step, gradients: list[list[Tensor]], values: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """One gradient for every parameter, out of those of each gradient group; they may be shards, see `dot`.

        Args:
            step: the step at hand.
            gradients: by group, then by parameter.
            values: the mean value of every term in this step.
        """
        raise NotImplementedError

    def logged(self) -> dict[str, Tensor]:
        """0-D values of this step that metrics.jsonl has too; the same on all processes, the same names in every step."""
        return {}

    def after_step(self, step: Step, values: Mapping[str, Tensor]) -> None:
        """Called after an optimizer step with the mean value of every term."""

    def after_evaluate(self, step: Step, metrics: Mapping[str, float]) -> None:
        """Called after an evaluation."""


def has_hook(kind: type[Method], hook: str) -> bool:
    """Whether a method implements a hook that has a default."""
    return getattr(kind, hook) is not getattr(Method, hook)


def dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Inner product of two gradients over all parameters, 0-D float32; whole also where the parameters are sharded."""
    products = [(a.float() * b.float()).sum() for a, b in zip(left, right, strict=True)]
    whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in products]  # type: ignore[operator]
    return torch.stack(whole).sum()
