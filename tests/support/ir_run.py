"""Execute the Triton IR of every launch of the calls in `ir_cases.py`, on a CPU.

    python -m tests.support.ir_run [words]      # one JSON line per case whose name has the words; TRITON_INTERPRET unset

The package `ttsem` compiles a launch to Triton IR for sm_90, executes the IR on copies of its tensors, and raises at the
line of the kernel that reads or writes outside a tensor or races with another program instance. `torch.empty`
returns NaN, so a value that no kernel wrote shows in the results, which are held to `impl="reference"` in float64.

The calls run as on a GPU: tensors report a CUDA device, blocks and warps are those of the GPU table, and half-precision
heads take the in-place path. Only the GEMMs are those of the CPU.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kdkernels
from kdkernels import Decoupled, Impl
from tests.support.ir_cases import RAGGED, Case, Tensors, cases

# Student and teacher are unrelated, so that nothing cancels: an exponent of up to 2^5 carries an error of 2^5 * 2^-24, and
# a result four of them. Each rounding of a gradient to half precision adds one unit of it.
FLOAT32_ERROR = 2.0**-17
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Bytes free and in all of the device that tensors report.
MEMORY = (140 * 2**30, 141 * 2**30)


@dataclass(frozen=True)
class Outcome:
    """What became of a case. The error is that of the worst result, divided by its bound."""

    name: str
    launches: int
    kernels: list[str]
    error: float
    worst: str
    fault: str
    seconds: float


@triton.jit
def _unmasked_kernel(out_ptr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, 1.0)  # planted: no mask


@triton.jit
def _racing_kernel(out_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(out_ptr + columns) + 1.0)  # planted: the elements of every instance


@triton.jit
def _short_kernel(out_ptr, N, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, 1.0, mask=columns < N - 1)  # planted: the last element is never written


# To a type checker a constant of a kernel is an object of the language.
UNMASKED: Any = _unmasked_kernel
RACING: Any = _racing_kernel
SHORT: Any = _short_kernel


def planted() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Kernels with a defect each, and the calls that show it."""

    def unmasked() -> Tensor:
        out = torch.empty(1000)
        UNMASKED[(2,)](out, BLOCK=512)
        return out

    def racing() -> Tensor:
        out = torch.zeros(64)
        RACING[(2,)](out, BLOCK=64)
        return out

    def short() -> Tensor:
        out = torch.empty(64)
        SHORT[(1,)](out, 64, BLOCK=64)
        return out

    yield "planted: a store without a mask", unmasked
    yield "planted: a race of program instances", racing
    yield "planted: an element that nobody writes", short


def hostile() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Ids out of range, which nobody looks for on a device: 0 where the losses of just their rows are NaN, else NaN.

    The ids are of the last row: past its logits the tensor ends.
    """

    def checked(name: str, **options: Any) -> Tensor:
        teacher = options.pop("teacher", torch.randn(2, RAGGED))
        labels = options.pop("labels", torch.tensor([3, 4]))
        student = torch.randn(2, RAGGED).requires_grad_()
        losses = kdkernels.kd_loss(student, teacher, labels, reduction="none", ce_weight=0.5, **options)
        losses.sum().backward()
        assert student.grad is not None
        bad = torch.stack([losses.detach().isnan(), student.grad.isnan().any(1)])
        return torch.where(bad == torch.tensor([name == "map", True]), 0.0, torch.nan)

    def mapped() -> Tensor:
        ids = torch.arange(RAGGED) % 2060
        ids[7] = 1 << 20
        return checked("map", teacher=torch.randn(2, 2060), vocab_map=ids)

    for label in (RAGGED, 1 << 40, -5):
        words = f"hostile: the label {label}"
        yield words, partial(checked, "label", labels=torch.tensor([3, label]), divergence="reverse_kl")
    yield (
        "hostile: the label -5, decoupled",
        partial(checked, "label", labels=torch.tensor([3, -5]), divergence=Decoupled()),
    )
    yield "hostile: an id beyond the teacher's", mapped


def _with_out_dtype(matmul: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A GEMM of CUDA that writes half-precision factors into float32; the CPU has only GEMMs of one dtype."""

    def call(*factors: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return matmul(*(factor.to(out_dtype or factor.dtype) for factor in factors), **options)

    return call


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other values for attributes of a module or class."""
    kept = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


@contextmanager
def executed() -> Iterator[list[str]]:
    """Within it launches are executed from their IR, and tensors report a CUDA device. Collects the kernels launched."""
    from ttsem import harness, mlir, sanitize

    launched: list[str] = []

    def triton_ir(record: Any, stage: str, target: Any) -> str:
        """The IR without the three stages of compilation below it, which nobody reads here."""
        launched.append(record.fn_name)
        return mlir.to_generic(harness._stage_text(record, stage, target), None)

    def backward(*args: Any, **kwargs: Any) -> Any:
        """The pretence is a mode of functions, which is off within `backward` unless it is entered again."""
        with mode:
            return engine(*args, **kwargs)

    engine = vars(torch.autograd)["_engine_run_backward"]
    with (
        replaced(harness, ir_for_launch=triton_ir),
        replaced(torch, mm=_with_out_dtype(torch.mm), addmm=_with_out_dtype(torch.addmm)),
        replaced(torch.autograd, _engine_run_backward=backward),
        replaced(torch.cuda, is_current_stream_capturing=lambda: False, mem_get_info=lambda device: MEMORY),
        sanitize.session(90) as session,
    ):
        mlir.enable_generic_printing()
        mode = torch.overrides._get_current_function_mode_stack()[-1]
        yield launched
        if session.races_unchecked:
            raise RuntimeError(f"{session.races_unchecked} launches are too large to be checked for races")


def _solve(case: Case, tensors: Tensors, impl: Impl | None) -> list[tuple[str, Tensor]]:
    """What a call returns and the gradients of its leaves, by name."""
    tensors = dict(tensors)
    leaves = [tensors[name].detach().clone().requires_grad_() for name in case.leaves]
    tensors |= dict(zip(case.leaves, leaves, strict=True))
    results = case.call(tensors, impl)
    results[0].backward()
    values = [(f"result {number}", value.detach()) for number, value in enumerate(results)]
    gradients = [(f"gradient of {name}", leaf.grad) for name, leaf in zip(case.leaves, leaves, strict=True)]
    return [(name, value) for name, value in values + gradients if value is not None]


def share_of_bound(actual: Tensor, exact: Tensor, roundings: int) -> float:
    """Root mean square error as a share of its bound; infinite where NaN or where a gradient is missing."""
    bound = (FLOAT32_ERROR + roundings * UNIT[actual.dtype]) * exact.square().mean().sqrt()
    error = (actual.double() - exact).square().mean().sqrt()
    return (error / bound).nan_to_num(nan=float("inf")).item() if bound > 0 else float(error > 0)


def _attempt(work: Callable[[], Any]) -> tuple[Any, list[str], str]:
    """The result, the kernels launched, and the fault if there was one."""
    result, fault, launched = None, "", []
    try:
        with executed() as launched:
            result = work()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return result, launched, fault


def run(case: Case) -> Outcome:
    """Execute one case and compare it with the reference."""
    started = time.perf_counter()
    torch.manual_seed(0)
    tensors = case.make()
    exact_inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in tensors.items()
    }
    exact = dict(_solve(case, exact_inputs, "reference"))
    results, launched, fault = _attempt(lambda: dict(_solve(case, tensors, None)))
    errors = dict.fromkeys(exact, float("inf"))
    if results is not None:
        errors |= {
            name: share_of_bound(value, exact[name], case.roundings) for name, value in results.items()
        }
    worst = max(errors, key=lambda name: errors[name])
    seconds = time.perf_counter() - started
    return Outcome(case.name, len(launched), sorted(set(launched)), errors[worst], worst, fault, seconds)


def run_plain(name: str, work: Callable[[], Tensor]) -> Outcome:
    """Execute a call of no leaves and without a reference; NaN counts as an error without bound."""
    started = time.perf_counter()
    result, launched, fault = _attempt(work)
    error = float("inf") if result is None or bool(result.isnan().any()) else 0.0
    return Outcome(
        name, len(launched), sorted(set(launched)), error, "result", fault, time.perf_counter() - started
    )


def main() -> None:
    """Run what the words of the command line choose, everything without one."""
    words = sys.argv[1:]
    outcomes = (run(case) for case in cases() if all(word in case.name for word in words))
    for outcome in outcomes:
        print(json.dumps(asdict(outcome)), flush=True)
    for name, work in (*hostile(), *planted()):
        if all(word in name for word in words):
            print(json.dumps(asdict(run_plain(name, work))), flush=True)


if __name__ == "__main__":
    main()
