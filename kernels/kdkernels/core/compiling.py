"""Whether `torch.compile` makes a graph at the moment, in which tensors have no values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import TracingContext


def making_a_graph() -> bool:
    """True while tensors have no values because `torch.compile` makes a graph.

    torch 2.11 and 2.12 say `is_compiling` only in code that the compiler reads, not in what it runs as one node.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def values_can_be_read(tensor: Tensor) -> bool:
    """True where looking at values costs nothing: on a CPU, and not while a graph is made."""
    return tensor.device.type == "cpu" and not making_a_graph()
