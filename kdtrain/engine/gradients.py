"""Gradients over processes: when they are exchanged, and gradients of groups of terms that a method combines."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_sync(
    accelerator: Accelerator, model: Any, *, last: bool, groups: int
) -> AbstractContextManager[Any]:
    """For one micro-batch: gradients are exchanged with the last one only.

    DDP exchanges nothing of several groups: it would wait for parameters that a group does not use. `taken` does.
    """
    sharded = accelerator.is_fsdp2
    return nullcontext() if last and (groups == 1 or sharded) else accelerator.no_sync(model)


def taken(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> list[Tensor]:
    """The gradient of every trained parameter as the average over processes, zeros where none; cleared from the parameters."""
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
    if accelerator.num_processes == 1 or any(isinstance(gradient, DTensor) for gradient in gradients):
        return gradients  # FSDP2 has averaged its shards
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = accelerator.reduce(flat, "mean")
    parts = flat.split([gradient.numel() for gradient in gradients])  # type: ignore[union-attr]
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def give(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """The inverse of `taken`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
