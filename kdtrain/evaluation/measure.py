"""Measures that all tasks share: bootstrap intervals and latency."""

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

RESAMPLES = 2000
MEASURE_ANOTHER = "run the training again in another output, or measure another run"


def bootstrap_interval(
    values: np.ndarray, counts: np.ndarray | None = None, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (2000 resamples of rows) of the mean of `values`, or of values.sum() / counts.sum().

    Args:
        values: one number per row.
        counts: positions of each row, where `values` are sums over positions.
    """
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(values), len(values))
        means.append(values[rows].mean() if counts is None else values[rows].sum() / counts[rows].sum())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    values: np.ndarray,
    others: np.ndarray,
    counts: np.ndarray | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of `values - others` over the same rows, or positions, with its bootstrap interval: (difference, low, high)."""
    difference = values.astype(np.float64) - others.astype(np.float64)
    mean = difference.mean() if counts is None else difference.sum() / counts.sum()
    return float(mean), *bootstrap_interval(difference, counts, level=level, seed=seed)


@torch.inference_mode()
def median_ms(
    run: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device, *, warm_up: int = 5
) -> float:
    """Median milliseconds of `run` on each of the inputs, the first of which warm up before."""
    times = []
    for one in [*inputs[:warm_up], *inputs]:
        start = now(device)
        run(one)
        times.append(now(device) - start)
    return float(np.median(times[-len(inputs) :]) * 1000)


def now(device: torch.device) -> float:
    """Seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
