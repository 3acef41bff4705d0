"""The one evaluation loop: numbers of every row of a split, from which a task computes its metrics."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from kdtrain.data.tokens import token_budget_batches
from kdtrain.outputs import Batch
from kdtrain.tasks.base import TrainingData


@torch.no_grad()
def measured_rows(
    measure: Callable[[Batch], Tensor], data: TrainingData, accelerator: Accelerator, *, tokens: int
) -> Tensor:
    """(rows, K) on the host, the same on all processes, which share the rows.

    Args:
        measure: (B, K) of one micro-batch, from a model in eval mode.
        tokens: padded tokens of one micro-batch.
    """
    batches = token_budget_batches(data.lengths, tokens)
    count, first = accelerator.num_processes, accelerator.process_index
    found: Tensor | None = None
    for start in range(
        0, len(batches), count
    ):  # every process runs equally many, or FSDP2 would wait for ever
        rows = batches[min(start + first, len(batches) - 1)]
        values = measure(data.batch(rows, accelerator.device))
        if found is None:
            found = values.new_zeros(len(data.lengths), values.shape[1])
        if start + first < len(batches):
            found[rows.to(found.device)] = values
    assert found is not None
    return accelerator.reduce(found, "sum").cpu()  # type: ignore[union-attr]
