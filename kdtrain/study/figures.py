"""The two pictures of a study: the metric over size, panels task by architecture; and what is retained of the teacher."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from kdtrain.plots import legend_beside, save_figure
from kdtrain.study.results import TaskResult

MARKERS = "osD^vPX*"


def _size_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(sizes)), [f"{size / 1e6:.2g} M" for size in sorted(set(sizes))])
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def metric_over_size(tasks: Sequence[TaskResult], path: Path) -> None:
    """The study's Figure 2: one row of panels a task, one column an architecture, one line a method."""
    architectures = sorted({entry.architecture for task in tasks for entry in task.entries}, reverse=True)
    figure, grid = plt.subplots(
        len(tasks),
        len(architectures),
        figsize=(4.6 * len(architectures), 3.2 * len(tasks)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for task, line in zip(tasks, grid, strict=True):
        for architecture, axes in zip(architectures, line, strict=True):
            own = [entry for entry in task.entries if entry.architecture == architecture]
            for number, method in enumerate(dict.fromkeys(entry.method for entry in task.entries)):
                points = sorted(
                    (entry.parameters, 100 * entry.mean(), 100 * entry.deviation())
                    for entry in own
                    if entry.method == method
                )
                if points:
                    sizes, means, deviations = zip(*points, strict=True)
                    axes.errorbar(
                        sizes,
                        means,
                        deviations,
                        marker=MARKERS[number % len(MARKERS)],
                        capsize=3,
                        label=method,
                        color=f"C{number}",
                    )
            if task.teacher is not None:
                axes.axhline(
                    100 * task.teacher["test"][task.metric],
                    linestyle="--",
                    color="black",
                    linewidth=1,
                    label="teacher",
                )
            _size_ticks(axes, [entry.parameters for entry in own])
            axes.set_title(f"{task.name}, {architecture}", fontsize=10)
            axes.set_xlabel("parameters")
        line[0].set_ylabel(f"test {task.metric}, %")
    legend_beside(figure, grid[0][-1])
    save_figure(figure, path)


def retained_over_size(tasks: Sequence[TaskResult], path: Path) -> bool:
    """Share of the teacher's headline figure over share of its parameters; False, and no file, without a teacher."""
    taught = [task for task in tasks if task.teacher is not None]
    if not taught:
        return False
    figure, line = plt.subplots(
        1, len(taught), figsize=(4.6 * len(taught), 3.4), squeeze=False, layout="constrained"
    )
    for task, axes in zip(taught, line[0], strict=True):
        assert task.teacher is not None
        for number, method in enumerate(dict.fromkeys(entry.method for entry in task.entries)):
            for entry in task.entries:
                share = task.retained(entry)
                if entry.method == method and share is not None:
                    axes.plot(
                        100 * entry.parameters / task.teacher["parameters"],
                        100 * share,
                        MARKERS[number % len(MARKERS)],
                        color=f"C{number}",
                        markerfacecolor=None if entry.architecture == "RoBERTa" else "none",
                    )
            axes.plot([], [], MARKERS[number % len(MARKERS)], color=f"C{number}", label=method)
        axes.axhline(100, linestyle="--", color="black", linewidth=1)
        axes.set(xlabel="parameters, % of the teacher's", ylabel=f"{task.metric}, % of the teacher's")
        axes.set_title(f"{task.name} (filled: RoBERTa, open: BiGRU)", fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend_beside(figure, line[0][-1])
    save_figure(figure, path)
    return True
