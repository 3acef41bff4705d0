"""What works on the tensors at the moment besides eager PyTorch: `torch.compile`, `torch.func`, `torch.jit.trace`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import TracingContext


def is_tracing() -> bool:
    """True while tensors have no values because `torch.compile` makes a graph.

    torch 2.11 and 2.12 say `is_compiling` only in code that the compiler reads, not in what it runs as one node.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def values_can_be_read(tensor: Tensor) -> bool:
    """True where looking at values costs nothing: on a CPU, and neither while a graph is made nor under `vmap`."""
    return tensor.device.type == "cpu" and not is_tracing() and not transformed()


def transformed() -> bool:
    """True inside `torch.func.grad`, `vmap`, `jvp` and the like."""
    return torch._C._are_functorch_transforms_active()


def recorded() -> bool:
    """True inside `torch.jit.trace`."""
    return torch._C._is_tracing()
