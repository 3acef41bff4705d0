"""What would be copied from the host to a device, found on a CPU: lists as indices, tensors made of lists."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# A list as an index becomes a tensor on the CPU and is copied to the device; so does a tensor made of a list.
COPIES = frozenset({"aten::lift_fresh", "aten::index.Tensor", "aten::index_put_"})


class CountHostCopies(TorchDispatchMode):
    """Collects the operators of `COPIES` that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        if name in COPIES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
