"""What goes with the student's tensors into a loss: teacher, labels, weights of the divergence, the map between vocabularies.

Autograd and compiled graphs take tensors only, so `Given` is taken apart before them (`tensors`, `layout`) and put together
in the solver (`filled`): from the checks to the row functions a teacher is one object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.autograd import Tensors
from ..teachers import CheckedTeacher, TeacherCrossTerm, TeacherHead, TeacherLogits, TeacherTopK

_TENSORS: dict[type[CheckedTeacher], tuple[str, ...]] = {
    TeacherLogits: ("logits",),
    TeacherHead: ("hidden", "weight", "bias"),
    TeacherTopK: ("logprobs", "indices"),
    TeacherCrossTerm: ("cross", "bias", "entropy"),
}


def index_rows(tensor: Tensor | None, index: Tensor | None) -> Tensor | None:
    """The rows of `index`, all of them for None."""
    return tensor if tensor is None or index is None else tensor.index_select(0, index)


def slice_rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows of a tensor that may be absent."""
    return None if tensor is None else tensor[rows]


@dataclass(frozen=True, eq=False)
class Given:
    """The frozen inputs of a loss. None of them gets a gradient."""

    teacher: CheckedTeacher
    labels: Tensor | None  # (N,) int64
    decoupled: tuple[Tensor, Tensor] | None  # (N,) weights of the target's and of the non-target divergence
    vocab_map: int | Tensor | None  # number of shared first ids, or (V_s,) teacher ids

    @property
    def tensors(self) -> Tensors:
        """All tensors in a fixed order, None for absent ones."""
        teacher = (getattr(self.teacher, name) for name in _TENSORS[type(self.teacher)])
        mapping = self.vocab_map if isinstance(self.vocab_map, Tensor) else None
        return *teacher, self.labels, *(self.decoupled or (None, None)), mapping

    @property
    def layout(self) -> Given:
        """The same without tensors: class and plain numbers of the teacher, the number of shared ids."""
        absent: dict[str, Any] = dict.fromkeys(_TENSORS[type(self.teacher)])
        shared = self.vocab_map if isinstance(self.vocab_map, int) else None
        return Given(replace(self.teacher, **absent), None, None, shared)

    def filled(self, tensors: Tensors) -> Given:
        """A layout with the tensors put back."""
        *teacher, labels, target, non_target, mapping = tensors
        names = _TENSORS[type(self.teacher)]
        return Given(
            replace(self.teacher, **dict(zip(names, teacher, strict=True))),
            labels,
            None if target is None or non_target is None else (target, non_target),
            self.vocab_map if mapping is None else mapping,
        )

    def rows(self, weight: Tensor | None, index: Tensor | None) -> Rows:
        """What has one entry per row, for the rows of `index`."""
        decoupled = self.decoupled
        if decoupled is not None and index is not None:
            decoupled = decoupled[0].index_select(0, index), decoupled[1].index_select(0, index)
        return Rows(index_rows(self.labels, index), index_rows(weight, index), decoupled)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a loss, as the row functions take them."""

    labels: Tensor | None  # (R,)
    weight: Tensor | None  # (R,) multiplies gradients; 0 for ignored rows
    decoupled: tuple[Tensor, Tensor] | None  # (R,) each

    def __getitem__(self, rows: slice) -> Rows:
        decoupled = self.decoupled
        return Rows(
            slice_rows(self.labels, rows),
            slice_rows(self.weight, rows),
            None if decoupled is None else (decoupled[0][rows], decoupled[1][rows]),
        )
