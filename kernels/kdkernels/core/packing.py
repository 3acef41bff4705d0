"""The arguments of a public function as tensors, plain numbers, strings and tuples: all that a compiled graph takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from ..teachers import TeacherCrossTerm, TeacherHead, TeacherLogits, TeacherTopK

# What an argument may be besides tensors, numbers and strings: by name, the class and its fields in their order.
CLASSES: tuple[type[Any], ...] = (
    *Divergence.__subclasses__(),
    TeacherLogits,
    TeacherHead,
    TeacherTopK,
    TeacherCrossTerm,
)


def _field_names(record: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record))


TRACEABLE = {record.__name__: (record, _field_names(record)) for record in CLASSES}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The public functions by name, as the graph calls them.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


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
    if name not in TRACEABLE:
        raise ValueError(
            f"a loss inside torch.compile cannot take an argument of type {name}; call the loss outside of the "
            "compiled region"
        )
    return (name, *[pack(getattr(value, field)) for field in TRACEABLE[name][1]])


def unpack(value: Any) -> Any:
    """The inverse of `pack`; numbers that the compiler made symbolic become those of this call."""
    if isinstance(value, tuple | list):
        name, *packed = value
        if name == "None":
            return None
        if name == "dtype":
            return DTYPES[packed[0]]
        items = tuple(unpack(item) for item in packed)
        return items if name == "tuple" else TRACEABLE[name][0](*items)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return value
