"""The largest batch that fits a given memory, with the fused losses and with eager ones: `python -m benchmarks.batches`.

Real training steps of benchmarks.language_steps, each size in turn: doubled until a step needs more than it is given, then
halved in. On a GPU memory is what tensors hold at most; on a CPU what the process holds beyond its imports.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.language_steps import CPU, GPU, OPERATION, SMOKE, Case
from benchmarks.measure import environment, peak_bytes_of, resident_bytes
from benchmarks.runner import ROOT, checkout_first

CASES = {"cpu": CPU[0], "gpu": GPU[0], "smoke": SMOKE[0]}
CONTENDERS = ("kd", "eager")
STEPS = 2  # the second one finds the optimizer's moments in place


def peak_of(contender: str, case: Case) -> int | None:
    """Bytes that models, optimizer and steps of this size hold at most; None when the device has no more."""
    inputs = OPERATION.make_inputs(case)

    def build_and_step() -> None:
        step = OPERATION.contenders[contender](case, inputs)
        for _ in range(STEPS):
            step()

    try:
        return peak_bytes_of(build_and_step, case.device)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, 0 if not even 1 does."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def search(contender: str, case: Case, limit: int) -> dict[str, int]:
    """Rows of the largest batch, and what it needed."""
    peak_of(contender, replace(case, rows=1))  # imports and thread pools are no part of a step
    peaks: dict[int, int] = {}

    def fits(rows: int) -> bool:
        peak = peak_of(contender, replace(case, rows=rows))
        if peak is None or peak > limit:
            return False
        peaks[rows] = peak
        return True

    rows = largest(fits)
    return {"rows": rows, "peak_bytes": peaks.get(rows, 0)}


def in_own_process(module: str, *arguments: str) -> Any:
    """What a module of this package prints last, as JSON, where nothing else has left memory behind."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=checkout_first(),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Print a table: rows and tokens of the largest batch, and the memory that it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__)
    parser.add_argument(
        "--suite", choices=sorted(CASES), default="cpu", help="which models (default: %(default)s)"
    )
    parser.add_argument(
        "--gibibytes", type=float, default=1.0, help="what a step may hold (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    case, limit = CASES[chosen.suite], int(chosen.gibibytes * 2**30)
    if chosen.one:
        print(json.dumps(search(chosen.one[0], case, int(chosen.one[1]))))
        return 0
    if case.device == "cuda" and not torch.cuda.is_available():
        print("Suite 'gpu' needs a CUDA or ROCm GPU, and torch finds none; try --suite cpu.", file=sys.stderr)
        return 2
    if case.device == "cpu" and resident_bytes() is None:
        print("benchmarks.batches reads memory from /proc, and this system has none.", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in environment(case.device).items()))
    print(
        f"\n{case.name.partition(', student')[2].strip()}, rows of {case.length} tokens, {chosen.gibibytes:g} GiB\n"
    )
    print("| | rows (0: not one fits) | tokens | it holds MiB |\n|---|---:|---:|---:|")
    for contender in CONTENDERS:
        one = ("--suite", chosen.suite, "--one", contender, str(limit))
        found = in_own_process("benchmarks.batches", *one)
        print(
            f"| {OPERATION.labels[contender]} | {found['rows']} | {found['rows'] * case.length} "
            f"| {found['peak_bytes'] / 2**20:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
