"""What a task hands to the frame: its data, its models, their metrics, and what it saves.

A task is positions with logits, labels that may be ignored, teachers, and states of layers. The frame (run, loop,
objective) knows nothing else of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtrain.outputs import Batch, Layers, Outputs, TeacherOutputs
from kdtrain.recipe import RunRecipe

if TYPE_CHECKING:
    from kdtrain.engine.checkpoint import Position
    from kdtrain.objective import Objective


class Models(Protocol):
    """How a task runs the models of a run. Teachers are held here, outside of the module that is trained."""

    @property
    def teachers(self) -> Mapping[str, Any]:
        """The teachers that can run now, by name, for samplers."""
        ...

    @property
    def dropout(self) -> bool:
        """Whether the student trains with its own rates of dropout."""
        ...

    def student_outputs(self, student: nn.Module, batch: Batch, layers: Layers) -> Outputs:
        """The student on one micro-batch."""
        ...

    def teacher_outputs(self, name: str, batch: Batch, layers: Layers) -> TeacherOutputs:
        """A teacher on the same micro-batch, computed now or stored with it."""
        ...

    def measure(self, student: nn.Module, batch: Batch) -> Tensor:
        """(B, K): the numbers of every row that the metrics are computed from."""
        ...

    def count(self, batch: Batch) -> int:
        """Counted positions of a micro-batch that a method made."""
        ...


class TrainingData(Protocol):
    """Training rows by number."""

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64: tokens of each row; rows of similar length are put into one batch."""
        ...

    def batch(
        self,
        rows: Tensor,
        /,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows as one micro-batch on the device.

        Args:
            step: 1 is the first optimizer step, 0 is for measuring; for tasks whose rows change with it.
            stored: whether stored teacher outputs come along.
            whole: row numbers of the whole batch, for weights that depend on it.
        """
        ...

    def count(self, rows: Tensor, /) -> int:
        """Counted positions of these rows: the divisor when they are one whole batch."""
        ...


@runtime_checkable
class WaitingData(Protocol):
    """Training rows that wait for something outside of this machine."""

    def waited(self) -> float:
        """Seconds that `batch` has waited since this was last asked."""
        ...


R = TypeVar("R", bound=RunRecipe)


@dataclass(frozen=True)
class Prepared:
    """Everything that a run trains and measures."""

    objective: "Objective"
    train: TrainingData
    valid: TrainingData
    """rows that choose the best checkpoint"""
    test: TrainingData | None = None
    """rows that are measured once, at the end"""


class SharedInputs:
    """What runs of one process share, such as data and teachers; each is made once. Files must not change meanwhile."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Any) -> Any:
        """What was made under this key, or what `make` makes now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Task(ABC, Generic[R]):
    """One run of a task, from its recipe. Parts are opened when they are first asked for."""

    name: ClassVar[str]
    sharded: ClassVar[bool] = False
    """whether FSDP2 may shard the student"""
    evaluation_tokens: ClassVar[int] = 8192
    """padded tokens of one forward pass while measuring"""

    def __init__(self, recipe: R, shared: SharedInputs | None = None) -> None:
        self.recipe = recipe
        self.shared = shared or SharedInputs()

    @abstractmethod
    def identity(self) -> dict[str, str | None]:
        """Open data and teachers, check them against each other, and hash them; nothing is written."""

    @abstractmethod
    def prepare(self, accelerator: Accelerator) -> Prepared:
        """Make tokenizer, student, rows and stored teacher outputs; may write into the folder of the run."""

    @abstractmethod
    def metrics(self, values: Tensor, data: TrainingData) -> dict[str, float]:
        """Metrics of a split out of what `Models.measure` returned for every row, (rows, K)."""

    @abstractmethod
    def final(
        self, prepared: Prepared, position: "Position", folder: Path, accelerator: Accelerator
    ) -> dict[str, dict[str, Any]]:
        """The metrics of the best weights by split, `valid` and perhaps `test`. Every process takes part."""

    @abstractmethod
    def save(self, prepared: Prepared, state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write `student/`, and what is saved beside it; return architecture, parameters, bytes and more of the student.

        Args:
            state: of the objective, whole, on the host.
        """

    @abstractmethod
    def describe_data(self, prepared: Prepared) -> dict[str, Any]:
        """Name and sizes of the data."""

    def describe_teacher(self, prepared: Prepared) -> dict[str, Any] | None:
        """The teacher; None without one."""
        return None

    def close(self) -> None:
        """Let go of what the run holds open, such as connections."""
