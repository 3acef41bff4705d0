"""Pictures of runs, drawn from their metrics.jsonl."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdtrain.evaluation.metrics import read_metrics
from kdtrain.files import write_atomic


def legend_beside(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, outside of them: inside it hides what it names."""
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")


def learning_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draw training loss, and validation accuracy (or loss, of language models) over steps, one line a run, into a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    every = {name: read_metrics(folder) for name, folder in runs.items()}
    metric = (
        "accuracy" if any("valid/accuracy" in line for lines in every.values() for line in lines) else "loss"
    )
    for name, lines in every.items():
        training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        valid = [(line["step"], line[f"valid/{metric}"]) for line in lines if f"valid/{metric}" in line]
        left.plot(*zip(*training, strict=True), label=name) if training else None
        right.plot(*zip(*valid, strict=True), marker="o", label=name) if valid else None
    left.set(xlabel="optimizer steps", ylabel="training loss")
    right.set(xlabel="optimizer steps", ylabel=f"validation {metric}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend_beside(figure, right)
    save_figure(figure, path)


def accuracy_intervals(models: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw one row a model: accuracy with its interval, and a dot for each seed. Linear baselines are grey."""
    figure, axes = plt.subplots(figsize=(8, 0.7 + 0.45 * len(models)), layout="constrained")
    for row, (name, metrics) in enumerate(models.items()):
        linear = metrics["parameters"] is None
        colour = "grey" if linear else "black" if name == "teacher" else f"C{row}"
        low, high = metrics["accuracy_interval"]
        accuracy = metrics["accuracy"]
        error = [[100 * (accuracy - low)], [100 * (high - accuracy)]]
        axes.errorbar(100 * accuracy, row, xerr=error, marker="D", capsize=3, color=colour)
        seeds = metrics["accuracy_of_seeds"]
        if len(seeds) > 1:
            axes.plot([100 * one for one in seeds], [row + 0.22] * len(seeds), ".", color=colour, alpha=0.6)
    axes.set_yticks(range(len(models)), list(models))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, % (95 % interval over the test rows; dots: seeds)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of its name (.png, or .svg with its text as text), whole or not at all; close it."""
    buffer = BytesIO()
    kind = path.suffix.removeprefix(".")
    # The same figure makes the same file: ids from a fixed salt, and no date.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
