"""Losses under `torch.compile`: a call is one node of the graph.

A loss reads numbers back on the way (how many rows count, whether sums are in range), which a graph cannot do. So the
compiler sees a public function's tensors and plain numbers only (`traceable`); its checks run while the graph is
made, on tensors without values; and what does the work is one operator (`traced.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._guards import TracingContext

from .divergences import JSD, TVD, AlphaBeta, Decoupled, ForwardKL, ReverseKL, SkewKL, SkewReverseKL
from .stats import KDStats
from .teachers import TeacherCrossTerm, TeacherHead, TeacherLogits, TeacherTopK

P = ParamSpec("P")
R = TypeVar("R")

# What an argument may be besides tensors, numbers and strings: by name, the class and its fields in their order.
RECORDS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    record.__name__: (record, tuple(field.name for field in fields(record)))
    for record in (
        *(ForwardKL, ReverseKL, JSD, SkewKL, SkewReverseKL, TVD, AlphaBeta, Decoupled),
        *(TeacherLogits, TeacherHead, TeacherTopK, TeacherCrossTerm),
    )
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The public functions by name, as the graph calls them.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def making_a_graph() -> bool:
    """True while tensors have no values because `torch.compile` makes a graph.

    torch 2.11 and 2.12 say `is_compiling` only in code that the compiler reads, not in what it runs as one node.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def values_can_be_read(tensor: Tensor) -> bool:
    """True where looking at values costs nothing: on a CPU, and not while a graph is made."""
    return tensor.device.type == "cpu" and not making_a_graph()


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """The function, and under `torch.compile` one node that calls it."""
    name = function.__name__
    FUNCTIONS[name] = function

    @wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        from .traced import call  # imports the compiler, which eager users do not wait for

        found = call(name, pack(args), {key: pack(value) for key, value in kwargs.items()})
        # The compiler knows tuples, but not named ones.
        return cast(R, (found[0], KDStats(*found[1])) if isinstance(found, tuple) else found)

    return entry


def pack(value: Any) -> Any:
    """Tensors and plain numbers as they are; None, dtypes and records as tuples that begin with a name."""
    if isinstance(value, Tensor | int | float | str):
        return value
    if value is None:
        return ("None",)
    if isinstance(value, tuple | list):
        return ("tuple", *[pack(item) for item in value])
    for dtype in DTYPES:
        if value is dtype:
            return ("dtype", DTYPES.index(dtype))
    name = type(value).__name__
    if name not in RECORDS:
        raise ValueError(
            f"a loss under torch.compile takes no {name}; call it outside of the compiled region"
        )
    return (name, *[pack(getattr(value, field)) for field in RECORDS[name][1]])


def unpack(value: Any) -> Any:
    """The inverse of `pack`; numbers that the compiler made symbolic become those of this call."""
    if isinstance(value, tuple | list):
        name, *packed = value
        if name == "None":
            return None
        if name == "dtype":
            return DTYPES[packed[0]]
        items = tuple(unpack(item) for item in packed)
        return items if name == "tuple" else RECORDS[name][0](*items)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return value
