"""Everything that needs a GPU in one command: `python -m benchmarks.gpu --out FOLDER`, at most nine minutes.

First the kernels' tests (no figure is printed of kernels that fail), then the row kernels alone, the suite `gpu` and the
losses between features. Each part writes or prints its results as it finishes, so a run that is cut keeps what it has.
Needs torch, triton, pytest and this repository; public peers take part when they can be imported.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.runner import ROOT

MINUTES = 9.0
FEATURE_MINUTES = 1.5  # of these, what the losses between features get


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after the other; the exit status is that of the first part that fails."""
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
    end = time.monotonic() + chosen.minutes * 60
    out = str(chosen.out.resolve())
    parts = (
        ["-m", "pytest", "-q", "tests/losses", "-k", "triton and not compile"],
        ["-m", "benchmarks.rows", "--out", out],
        ["-m", "benchmarks", "--suite", "gpu", "--out", out, "--skip-tests"],
        ["-m", "benchmarks.features", "--suite", "gpu", "--rounds", "3"],
        ["-m", "benchmarks.contextual", "--suite", "gpu", "--rounds", "3"],
    )
    for part in parts:
        left = end - time.monotonic()
        command = [sys.executable, *part]
        if "--skip-tests" in part:
            command += ["--minutes", f"{max(left / 60 - FEATURE_MINUTES, 1.0):.2f}"]
        print(f"[{left / 60:.1f} minutes left] {' '.join(part)}", flush=True)
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=max(left, 1.0), check=False).returncode
        except subprocess.TimeoutExpired:
            print("out of time; what was finished is in the folder", flush=True)
            return 0
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
