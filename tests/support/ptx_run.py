"""Execute the in-place row kernels from their PTX under adversarial orders of their warps.

    python -m tests.support.ptx_run [words]     # one JSON line per case whose name has the words; TRITON_INTERPRET unset

The functions of the Triton back end are called on CPU tensors. A launch is compiled by Triton with the options and
specialisations it would have on the GPU, and its PTX is interpreted on the tensors. Each call runs once for every order
of the warps between two barriers; the results have to be equal to the bit, and near those of the torch back end in float64.
In one more run another lane wins where all lanes of a warp store their sum, of which each has rounded another part last.
"""

import ctypes
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.support.ir_run import share_of_bound
from tests.support.ptx import Program
from tests.support.ptx_cases import Case, cases
from tests.support.ptx_memory import Memory
from tests.support.ptx_values import TYPES
from tests.support.ptx_warp import Warp, run_warp

ORDERS = ("first to last", "last to first", "interleaved")
FIRST_LANE_WINS = "first lane wins"
WHOLE = 1 << 62


@dataclass(frozen=True)
class Outcome:
    """What became of a case. The error is that of the worst result, divided by its bound."""

    name: str
    launches: int
    instructions: int  # of all kernels' code
    barriers: int
    orders_agree: bool
    error: float
    fault: str
    seconds: float


class _Driver:
    """What Triton asks of a driver to compile; the device number is the architecture, so that caches are its own."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def run_block(program: Program, warps: list[Warp], memory: Memory, order: str, choice: random.Random) -> None:
    """Run one program instance, its warps in the given order between two barriers."""
    with np.errstate(all="ignore"):
        while not all(warp.done for warp in warps):
            ready = list(warps) if order != "last to first" else warps[::-1]
            while ready:
                # An interleaved warp runs a few instructions; the others all that there are before the barrier.
                warp, most = ready[0], WHOLE
                if order == "interleaved":
                    warp, most = choice.choice(ready), choice.randint(1, 40)
                run_warp(warp, program.instructions, most)
                if warp.waits or warp.done:
                    ready.remove(warp)
            if any(warp.done for warp in warps) and not all(warp.done for warp in warps):
                raise RuntimeError("some warps wait at a barrier that others never reach")
            memory.barrier()


def _bytes_of(tensor: Tensor) -> tuple[int, np.ndarray]:
    """Address and bytes of a tensor's whole storage."""
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    return start, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))


@contextmanager
def executed(architecture: int, order: str) -> Iterator[dict[str, Program]]:
    """Within it launches are interpreted from their PTX. Collects the programs by the hash of their kernel."""
    programs: dict[str, Program] = {}
    launch: Any = JITFunction.run

    def interpret(self: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        kernel = launch(self, grid=grid, warmup=True, **arguments)
        program = programs.setdefault(kernel.hash, Program(kernel.asm["ptx"]))
        names = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        values = [arguments[name] for name in names] + [0] * (len(program.parameters) - len(names))
        tensors = dict(_bytes_of(value) for value in values if isinstance(value, Tensor))
        raw = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
        parameters = [
            np.array([value]).astype(TYPES[kind]) for value, kind in zip(raw, program.parameters, strict=True)
        ]
        choice = random.Random(0)
        (rows,) = grid
        for row in range(rows):
            memory = Memory(list(tensors.items()), kernel.metadata.shared, order == FIRST_LANE_WINS)
            run_block(program, program.warps(parameters, (row, 0, 0), memory), memory, order, choice)

    kept: Any = JITFunction
    kept.run = interpret
    driver.set_active(_Driver(architecture))  # pyright: ignore[reportArgumentType]
    try:
        yield programs
    finally:
        kept.run = launch


def run(case: Case) -> Outcome:
    """One case in every order."""
    import kdkernels._torch
    import kdkernels._triton

    started = time.perf_counter()
    torch.manual_seed(0)
    tensors = case.make()
    exact = case.call(kdkernels._torch, {name: _exact(value) for name, value in tensors.items()})
    results: list[dict[str, Tensor]] = []
    programs: dict[str, Program] = {}
    fault = ""
    for order in (*ORDERS, FIRST_LANE_WINS):
        try:
            with executed(case.architecture, order) as programs, case.planted():
                results.append(
                    case.call(kdkernels._triton, {name: value.clone() for name, value in tensors.items()})
                )
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            break
    agree = fault == "" and all(
        torch.equal(_raw(value), _raw(results[0][name]))
        for result in results[: len(ORDERS)]
        for name, value in result.items()
    )
    errors = [share_of_bound(value, exact[name], 1) for result in results for name, value in result.items()]
    code = [instruction for program in programs.values() for instruction in program.instructions]
    return Outcome(
        case.name,
        len(programs),
        len(code),
        sum(instruction.is_barrier for instruction in code),
        agree,
        max(errors, default=float("inf")),
        fault,
        time.perf_counter() - started,
    )


def _exact(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.clone()


def _raw(value: Tensor) -> Tensor:
    """The bits, so that NaN equals NaN."""
    return value.contiguous().view(torch.uint8)


def main() -> None:
    """Run what the words of the command line choose, everything without one; after `--cases` they are whole names."""
    words = sys.argv[1:]
    names = words[1:] if words[:1] == ["--cases"] else None
    for case in cases():
        if case.name in names if names is not None else all(word in case.name for word in words):
            print(json.dumps(asdict(run(case))), flush=True)


if __name__ == "__main__":
    main()
