"""What the schedules run on a GPU, found on a CPU: tensors that report a CUDA device, and each operation with its bytes.

The row work is left out (the back end `Rows` writes nothing): its kernels are counted from compiled code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

# What moves no bytes: views, allocations (the tests poison them by `fill_`), facts.
_FREE = {
    "__get__",
    "__getitem__",
    "view",
    "t",
    "expand",
    "unsqueeze",
    "squeeze",
    "detach",
    "empty",
    "empty_like",
    "fill_",
}
_FREE |= {"new_empty", "dim", "size", "stride", "numel", "is_floating_point", "data_ptr", "element_size"}


@dataclass(frozen=True)
class Run:
    """One operation: its name, and shape and dtype of the tensors that it reads and that it writes or returns."""

    name: str
    read: list[tuple[tuple[int, ...], torch.dtype]]
    written: list[tuple[tuple[int, ...], torch.dtype]]

    @property
    def bytes(self) -> int:
        """Read and written, each tensor once."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in [*self.read, *self.written])


class Device(TorchFunctionMode):
    """Within it tensors report a CUDA device; collects the operations that move bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__self__", None) is Tensor.device:
            return torch.device("cuda", 0)
        if "device" in given:
            given["device"] = torch.device("cpu")
        name = func.__name__
        out = given.get("out")
        read = _facts((args, {key: value for key, value in given.items() if key != "out"}))
        wide = given.pop("out_dtype", None)  # a GEMM of CUDA with half-precision factors and float32 sums
        if wide is not None:
            args = tuple(factor.to(wide) for factor in args)
        found = func(*args, **given)
        if name not in _FREE and (resolve_name(func) or "").startswith("torch."):
            self.runs.append(Run(name, read, _facts(found if out is None else out)))
        return found


def _facts(values: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(value.shape), value.dtype) for value in tree_leaves(values) if isinstance(value, Tensor)]


class Rows:
    """A back end whose rows do nothing."""

    @staticmethod
    def kd_rows(student_logits: Tensor, *_: Any, **options: Any) -> tuple[Tensor, Tensor]:
        rows = torch.empty(len(student_logits))
        return rows, rows

    @staticmethod
    def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None, device: torch.device) -> int:
        return rows if chunk_bytes is None else max(1, chunk_bytes // (8 * vocabulary))
