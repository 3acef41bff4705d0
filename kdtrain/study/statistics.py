"""Figures over seeds and rows: means, deviations, and whether a method differs from the baseline."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import f1_score

RESAMPLES = 4000
CHUNK = 200
"""Resamples at a time; bounds the memory to CHUNK x rows numbers."""


@dataclass(frozen=True)
class Difference:
    """Mean of a method minus mean of the baseline, over the same seeds and the same test rows."""

    mean: float
    low: float
    high: float
    p: float
    """two-sided: how often a resample falls on the other side of 0"""


def row_counts(logits: np.ndarray, labels: np.ndarray, metric: str) -> np.ndarray:
    """What each row adds to a metric, (rows, k): the metric is a function of the sums (`metric_of_sums`).

    accuracy and top3: (right, 1). f1: (true positives, predicted positives, positives), two classes.
    """
    predicted = logits.argmax(axis=1)
    if metric == "f1":
        return np.stack([(predicted == 1) & (labels == 1), predicted == 1, labels == 1], axis=1).astype(float)
    if metric == "top3":
        top = np.argsort(-logits, axis=1, kind="stable")[:, :3]
        right = (top == labels[:, None]).any(axis=1)
    else:
        right = predicted == labels
    return np.stack([right, np.ones(len(labels))], axis=1).astype(float)


def metric_of_sums(sums: np.ndarray) -> np.ndarray:
    """The metric of summed counts (..., k)."""
    if sums.shape[-1] == 2:
        return sums[..., 0] / sums[..., 1]
    both = sums[..., 1] + sums[..., 2]
    return np.divide(2 * sums[..., 0], both, out=np.zeros_like(both), where=both > 0)


def paired_test(
    method: list[np.ndarray], baseline: list[np.ndarray], *, level: float = 0.95, seed: int = 0
) -> Difference:
    """Bootstrap of the difference of mean metrics: seeds and test rows are drawn anew together, both sides alike.

    Args:
        method: one (rows, k) array of `row_counts` for each seed.
        baseline: the same for the baseline, seed by seed.
    """
    ours, theirs = np.stack(method), np.stack(baseline)  # (seeds, rows, k)
    generator = np.random.default_rng(seed)
    seeds, rows = ours.shape[:2]
    drawn = []
    for _ in range(0, RESAMPLES, CHUNK):
        weights = np.stack(
            [np.bincount(generator.integers(0, rows, rows), minlength=rows) for _ in range(CHUNK)]
        )
        values = [
            metric_of_sums(np.einsum("cr,srk->csk", weights, side, optimize=True)) for side in (ours, theirs)
        ]
        chosen = generator.integers(0, seeds, (CHUNK, seeds))
        drawn.append(np.take_along_axis(values[0] - values[1], chosen, axis=1).mean(axis=1))
    differences = np.concatenate(drawn)
    mean = float((metric_of_sums(ours.sum(axis=1)) - metric_of_sums(theirs.sum(axis=1))).mean())
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    other_side = min((differences <= 0).mean(), (differences >= 0).mean())
    return Difference(
        mean, float(low), float(high), float(min(1.0, max(2 * other_side, 1 / len(differences))))
    )


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur."""
    return float(f1_score(labels, logits.argmax(axis=1), average="macro"))


def deviation(values: list[float]) -> float:
    """Standard deviation over seeds (n - 1); 0 of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
