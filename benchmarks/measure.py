"""Clock, high-water mark of memory, quartiles, and the stamp that says where figures come from."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds_of(step: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one step, from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int | None:
    """What this process holds now; None where the system has no /proc."""
    return _status_bytes("VmRSS") if CLEAR_REFS.exists() else None


def peak_bytes_of(step: Callable[[], object], device: str = "cpu") -> int | None:
    """How far one step raises this process's memory above what it holds before (inputs, code).

    On a GPU that is what tensors hold, as the allocator counts it. On a CPU it is resident memory: the kernel keeps the high-water mark (VmHWM); writing 5 to clear_refs sets it back to what is resident now.
    None where the system has no such file: the cell of the table stays empty.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    # Freed heap goes back to the system first: memory that malloc kept from the warm-up would hide what the step needs.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that was measured, marked when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/kernels", ":/benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and with what this runs. Taken before the first measurement, so that the load is the others' and not ours."""
    packages = ("triton", "transformers", "trl", "liger-kernel", "fla-core", "cut-cross-entropy")
    name = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    gpu: dict[str, Any] = {}
    if device == "cuda":
        name = torch.cuda.get_device_name()
        gpu = {"driver": _driver(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    return {
        "device": name,
        **gpu,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # names its build (+cpu, +cu130), which the registry's metadata leave out
        **{package: version for package in packages if (version := _version(package))},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
