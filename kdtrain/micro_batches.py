"""The batch of one optimizer step: its rows split over micro-batches and processes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtrain.outputs import Batch
from kdtrain.tasks.base import TrainingData


@dataclass(frozen=True)
class StepBatch:
    """The batch of one optimizer step, as this process works on it."""

    micro_batches: Iterable[Batch]
    """can be iterated over several times; made when asked for unless a method had to see them all"""
    scales: Sequence[float]
    """what the loss of each micro-batch is multiplied by: DDP averages, the loss is a sum. 0 for a filler."""
    divisor: int
    """counted positions of the whole batch, over all processes"""
    rows: Tensor
    """row numbers of the whole batch"""

    def __len__(self) -> int:
        return len(self.scales)

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        return zip(self.micro_batches, self.scales, strict=True)


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of this process, made when asked for."""

    parts: Sequence[Tensor]
    """row numbers of each; none for a filler"""
    whole: Tensor
    """row numbers of the whole batch; a filler runs the first, as every process takes part in every exchange"""
    data: TrainingData
    device: torch.device
    step: int
    stored: bool = True

    @classmethod
    def of(
        cls,
        rows: Tensor,
        splits: int,
        data: TrainingData,
        accelerator: Accelerator,
        step: int,
        *,
        stored: bool = True,
    ) -> "MicroBatches":
        """Split the rows of a whole batch over micro-batches and processes."""
        parts = rows.tensor_split(splits)[accelerator.process_index :: accelerator.num_processes]
        return cls(parts, rows, data, accelerator.device, step, stored)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts:
            rows = part if len(part) else self.whole[:1]
            yield self.data.batch(rows, self.device, step=self.step, stored=self.stored, whole=self.whole)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, a module is in eval mode: no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def gather_ragged(values: Tensor, accelerator: Accelerator) -> tuple[Tensor, int]:
    """The rows of every process, (sum of n, ...) in order of the processes, and the place of the first own row."""
    if accelerator.num_processes == 1:
        return values, 0
    sizes: Tensor = accelerator.gather(torch.tensor([len(values)], device=values.device))  # type: ignore[assignment]
    longest = int(sizes.max())
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    parts: Tensor = accelerator.gather(padded[None])  # type: ignore[assignment]
    whole = torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
    return whole, int(sizes[: accelerator.process_index].sum())
