"""Everything that needs a GPU in one command: `python -m benchmarks.gpu --out FOLDER`, at most nine minutes.

First the kernels' tests (no figure is printed of kernels that fail), then the row kernels alone, the suites `gpu`,
`gpu_features` and `gpu_steps`, and the largest batch. Results are written after every case, so a run that is cut keeps what
it has. Needs torch, triton and this repository; pytest (without it the errors against fp64 beside each figure are the only
check, and that is said), transformers for the steps, and public peers take part when they can be imported.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.runner import ROOT, checkout_first

MINUTES = 9.0
# Shares of the time that is left when a part starts: what comes later shall not be eaten by what came before.
PARTS: tuple[tuple[float, list[str]], ...] = (
    # Warnings are shown and no errors: one of a library's other version says nothing of the kernels.
    (0.4, ["-m", "pytest", "-q", "-W", "default", "tests/losses", "-k", "triton and not compile"]),
    (0.2, ["-m", "benchmarks.rows"]),
    (0.7, ["-m", "benchmarks", "--suite", "gpu"]),
    (0.5, ["-m", "benchmarks", "--suite", "gpu_features"]),
    (0.7, ["-m", "benchmarks", "--suite", "gpu_steps"]),
    (1.0, ["-m", "benchmarks.batches", "--suite", "gpu", "--gibibytes", "40"]),
)


def installed(module: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(module) is not None


def command_of(part: list[str], minutes: float, out: Path) -> list[str] | None:
    """The part's command line with its time and its folder; None, and a line that says why, when it cannot run here."""
    command = [sys.executable, *part]
    if "pytest" in part:
        if not installed("pytest") or not installed("hypothesis"):
            print(
                "pytest or hypothesis is not installed: no tests; read the errors beside the figures",
                flush=True,
            )
            return None
        return [*command, "--numprocesses", "8"] if installed("xdist") else command
    if ("gpu_steps" in part or "benchmarks.batches" in part) and not installed("transformers"):
        print("transformers is not installed: no training steps", flush=True)
        return None
    if part[1] == "benchmarks":
        command += ["--skip-tests", "--minutes", f"{minutes:.2f}"]
    return command if "benchmarks.batches" in part else [*command, "--out", str(out)]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after the other. Tests that fail end it; a part that fails or is cut leaves the others to run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where CSV and JSON go")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs a CUDA or ROCm GPU, and torch finds none; `python -m benchmarks` runs on a CPU.",
            file=sys.stderr,
        )
        return 2
    return run_parts(time.monotonic() + chosen.minutes * 60, chosen.out.resolve())


def run_parts(end: float, out: Path, parts: tuple[tuple[float, list[str]], ...] = PARTS) -> int:
    """0 when every part ran or was cut by the clock, else the status of the first that failed."""
    failed = 0
    for share, part in parts:
        seconds = share * max(end - time.monotonic(), 0.0)
        command = command_of(part, seconds / 60, out)
        if command is None:
            continue
        print(f"[{(end - time.monotonic()) / 60:.1f} minutes left] {' '.join(part)}", flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=checkout_first(), timeout=max(seconds, 1.0), check=False
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            tests = (
                "; the tests did not finish, so figures below rest on those that ran"
                if "pytest" in part
                else ""
            )
            print(f"cut by the clock; what was finished stands{tests}", flush=True)
            continue
        if status and "pytest" in part:
            print("The kernels' tests fail, so there are no figures.", flush=True)
            return status
        failed = failed or status
    return failed


if __name__ == "__main__":
    sys.exit(main())
