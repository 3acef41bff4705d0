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


def accuracy_against_size(models: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy with its interval over parameters; models without parameters are the floor, a dashed line."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    floors = [metrics["accuracy"] for metrics in models.values() if metrics["parameters"] is None]
    sized = {name: metrics for name, metrics in models.items() if metrics["parameters"] is not None}
    for name, metrics in sized.items():
        low, high = metrics["accuracy_interval"]
        accuracy = metrics["accuracy"]
        axes.errorbar(
            metrics["parameters"] / 1e6,
            100 * accuracy,
            yerr=[[100 * (accuracy - low)], [100 * (high - accuracy)]],
            marker="o",
            capsize=3,
            linestyle="none",
            color="black" if name == "teacher" else None,  # students keep the colours of the learning curves
            label=name,
        )
    if floors:
        axes.axhline(100 * max(floors), linestyle="--", color="grey", label="floor: best bag of tokens")
    axes.set(xscale="log", xlabel="parameters, millions", ylabel="test accuracy, %")
    sizes = sorted({metrics["parameters"] / 1e6 for metrics in sized.values()})
    axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
    axes.minorticks_off()
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend_beside(figure, axes)
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
