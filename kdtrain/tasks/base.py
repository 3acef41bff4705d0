"""What a task hands to the loop: rows by number, and a module that turns a piece of a batch into a loss.

The loop knows nothing else of a task. A task is a `TrainingData`, an `Objective`, and a function that evaluates.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtrain.recipe import TrainingRecipe


class RunRecipe(Protocol):
    """The part of any task's recipe that the loop reads."""

    @property
    def training(self) -> TrainingRecipe:
        """Steps, optimizer and how often to look."""
        ...

    @property
    def seed(self) -> int:
        """First weights, order of the rows, dropout."""
        ...


class TrainingData(Protocol):
    """Training rows by number."""

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64: tokens of each row; rows of similar length are put into one batch."""
        ...

    def batch(self, index: Tensor, device: torch.device) -> Any:
        """The given rows as one piece of a batch, on the device."""
        ...

    def count(self, index: Tensor) -> int:
        """What the sums over these rows are divided by when they are one whole batch: rows, or counted tokens."""
        ...


class Objective(nn.Module):
    """Student and everything that is trained along with it, as one module.

    Every weight that a loss uses is used inside `forward`, so that the wrappers of DDP and FSDP2 see it.
    """

    names: tuple[str, ...] = ()
    """of the terms, in the order in which `forward` gives them"""

    def start_step(self, step: int, total_steps: int) -> None:
        """Told before every optimizer step; weights and temperature may depend on it."""

    def look_ahead(
        self,
        pieces: Iterable[Any],
        rows: Sequence[Tensor],
        whole: Tensor,
        divisor: int,
        accelerator: Accelerator,
    ) -> tuple[Iterable[Any], int]:
        """Look at the batch as a whole before it is worked on; by default nothing changes.

        Here a method may make the rows anew, weigh them by a statistic of the whole batch, or compute what only
        the whole batch can tell. Every process calls this at the same time with the same number of pieces.

        Args:
            pieces: what this process will work on, as `TrainingData.batch` gives them, made when they are asked for.
            rows: the row numbers of each piece; none for a piece that only fills up and counts as nothing.
            whole: the row numbers of the whole batch, over all processes.
            divisor: of the whole batch.

        Returns:
            The pieces to work on, as many as before, and the divisor of the whole batch over all processes.
        """
        return pieces, divisor

    def forward(self, batch: Any, divisor: int) -> tuple[Tensor, Tensor]:
        """Loss of one piece, a sum divided by `divisor`, and the detached, unweighted sum of each term, (terms,)."""
        raise NotImplementedError


Evaluate = Callable[[nn.Module, Accelerator], dict[str, float]]
"""Measure the model (as accelerate wrapped it) and give its metrics; every process takes part and gets the same."""
