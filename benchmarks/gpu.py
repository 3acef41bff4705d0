"""Everything that needs a GPU in one command: `python -m benchmarks.gpu --out FOLDER`, at most eleven and a half minutes.

In order of worth: the kernels' tests; error and time of the four GEMMs; the reference shape beside the public peers, then in
chunks of 1024, 2048 and 4096 rows; the row kernels beside a copy; `kd_loss`; the losses between inner layers. `--parts` names
some of them, or the longer suites `gpu` and `gpu_steps` and the largest batch. Each part is a process with a time of its own,
so one that fails or is slow costs no other. What the tests say goes to `tests.txt`; figures of kernels that fail them are
measured all the same, for they may be all that a borrowed machine gives, but are none to publish. Figures are CSV with the
environment's stamp, written after every record, so a run that is cut keeps what it has. Needs torch, triton and this
repository; pytest (without it the errors against fp64 beside each figure are the only check, and that is said), transformers
and accelerate for the steps, and public peers take part when they can be imported.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.runner import ROOT, checkout_first

MINUTES = 11.5


@dataclass(frozen=True)
class Part:
    """One process: its weight, by which the time that is left is divided among it and those after it, and its command."""

    weight: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


_STEPS = ("transformers", "accelerate", "yaml")
# What matters most comes first.
PARTS = {
    "tests": Part(
        3.0,
        # Warnings are shown and no errors: one of a library's other version says nothing of the kernels.
        (
            "-m",
            "pytest",
            "-v",
            "-W",
            "default",
            "--tb=short",
            "--maxfail=50",
            "tests/losses",
            "-k",
            "(triton or row_state or device_safety) and not compile and not triton_ir",
        ),
        ("pytest", "hypothesis"),
    ),
    "gemms": Part(0.7, ("-m", "benchmarks.gemms")),
    "reference": Part(2.2, ("-m", "benchmarks", "--suite", "gpu_reference")),
    "chunks": Part(1.3, ("-m", "benchmarks", "--suite", "gpu_chunks", "--contenders", "products", "ours")),
    "rows": Part(1.0, ("-m", "benchmarks.rows")),
    "kd": Part(1.3, ("-m", "benchmarks", "--suite", "gpu_kd")),
    "features": Part(1.5, ("-m", "benchmarks", "--suite", "gpu_features")),
    "gpu": Part(3.0, ("-m", "benchmarks", "--suite", "gpu")),
    "gpu_steps": Part(1.5, ("-m", "benchmarks", "--suite", "gpu_steps"), _STEPS),
    "batches": Part(1.0, ("-m", "benchmarks.batches", "--suite", "gpu", "--gibibytes", "40"), _STEPS),
}
# Without `--parts`; the others are for a longer loan.
FIRST = ("tests", "gemms", "reference", "chunks", "rows", "kd", "features")


def command_of(name: str, minutes: float, out: Path) -> list[str] | None:
    """The part's command line with its time and its folder; None, and a line that says why, when it cannot run here."""
    part = PARTS[name]
    missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
    if missing:
        instead = "; read the errors beside the figures" if name == "tests" else ""
        print(f"no {name}: not installed: {', '.join(missing)}{instead}", flush=True)
        return None
    command = [sys.executable, *part.command]
    if name == "tests":
        if importlib.util.find_spec("xdist") is None:
            return command
        # Compiling the kernels takes most of the time, one core each.
        return [*command, "--numprocesses", str(min(16, os.cpu_count() or 1)), "--dist", "loadgroup"]
    if name == "batches":
        return command
    command += ["--out", str(out)]
    return [*command, "--skip-tests", "--minutes", f"{minutes:.2f}"] if "--suite" in command else command


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after the other; one that fails or is cut leaves the others to run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where CSV and JSON go")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default: %(default)s)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(FIRST),
        help=f"which, in this order (default: {' '.join(FIRST)})",
    )
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs a CUDA or ROCm GPU, and torch finds none; `python -m benchmarks` runs on a CPU.",
            file=sys.stderr,
        )
        return 2
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    return run_parts(time.monotonic() + chosen.minutes * 60, out, chosen.parts)


def run_parts(
    end: float,
    out: Path,
    names: list[str],
    command: Callable[[str, float, Path], list[str] | None] = command_of,
) -> int:
    """0 when every part ran or was cut by the clock, else the status of the first that failed."""
    failed = 0
    for number, name in enumerate(names):
        left = max(end - time.monotonic(), 0.0)
        seconds = left * PARTS[name].weight / sum(PARTS[one].weight for one in names[number:])
        line = command(name, seconds / 60, out)
        if line is None:
            continue
        print(f"[{left / 60:.1f} minutes left] {name}: at most {seconds / 60:.1f}", flush=True)
        log = out / "tests.txt" if name == "tests" else None
        status = run_for(line, max(seconds, 1.0), log)
        if log is not None:
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), flush=True)
        if status is None:
            print(f"{name}: cut by the clock; what was finished stands", flush=True)
        elif status and name == "tests":
            print("The kernels' tests fail: see tests.txt, and publish no figure from below.", flush=True)
        elif status:
            print(f"{name}: failed with status {status}", flush=True)
        failed = failed or status or 0
    return failed


def run_for(command: list[str], seconds: float, log: Path | None) -> int | None:
    """Its status, or None when the time is up; then all processes that it started are ended, as they hold the GPU."""
    with log.open("w") if log else nullcontext() as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=checkout_first(),
            stdout=file,
            stderr=file and subprocess.STDOUT,
            process_group=0,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
