"""What came out of a study's runs, one entry for each cell of task, student and method, over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from kdtrain.study.plan import BASELINE, Cell
from kdtrain.study.statistics import Difference, deviation, paired_test, row_counts
from kdtrain.summary import FILE, Summary


@dataclass(frozen=True)
class Entry:
    """All seeds of one student under one method on one task."""

    task: str
    student: str
    method: str
    metric: str
    """the task's headline figure"""
    architecture: str
    parameters: int
    seeds: tuple[int, ...]
    summaries: tuple[Summary, ...]
    difference: Difference | None
    """against the baseline on the same seeds; None for the baseline and where it is missing"""

    def values(self, name: str) -> list[float]:
        """A test metric of every seed."""
        return [summary.metrics[name] for summary in self.summaries]

    def mean(self, name: str | None = None) -> float:
        """Mean over seeds of a test metric, the headline by default."""
        return float(np.mean(self.values(name or self.metric)))

    def deviation(self, name: str | None = None) -> float:
        """Standard deviation over seeds."""
        return deviation(self.values(name or self.metric))

    def cost(self, name: str) -> float:
        """Mean over seeds of a figure of the training."""
        return float(np.mean([summary.training[name] for summary in self.summaries]))


@dataclass(frozen=True)
class TaskResult:
    """One task: its teacher's own test metrics and all entries."""

    name: str
    metric: str
    test_rows: int
    majority: float
    """share of the largest class among the test rows"""
    teacher: dict[str, Any] | None
    entries: tuple[Entry, ...]

    def retained(self, entry: Entry) -> float | None:
        """The entry's headline figure as a share of the teacher's."""
        return None if self.teacher is None else entry.mean() / self.teacher["test"][self.metric]


def collect(cells: Sequence[Cell], metrics: dict[str, str]) -> list[TaskResult]:
    """Read the finished runs of all cells; `metrics` names each task's headline figure."""
    tasks = []
    for task in dict.fromkeys(cell.task for cell in cells):
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            if cell.task == task and (Path(cell.recipe.output) / FILE).exists():
                groups.setdefault((cell.student, cell.method), []).append(cell)
        entries = [_entry(group, groups, metrics[task]) for group in groups.values()]
        if not entries:
            continue
        labels = _predictions(next(iter(groups.values()))[0])[1]
        teacher = next((one.teacher for entry in entries for one in entry.summaries if one.teacher), None)
        majority = float(np.bincount(labels).max() / len(labels))
        tasks.append(TaskResult(task, metrics[task], len(labels), majority, teacher, tuple(entries)))
    return tasks


def _entry(group: list[Cell], groups: dict[tuple[str, str], list[Cell]], metric: str) -> Entry:
    summaries = tuple(Summary.load(Path(cell.recipe.output)) for cell in group)
    first, seeds = group[0], tuple(cell.recipe.seed for cell in group)
    baseline = {
        cell.recipe.seed: cell
        for (student, _), cells in groups.items()
        for cell in cells
        if student == first.student and cell.recipe.method_name == BASELINE
    }
    difference = None
    shared = [cell for cell in group if cell.recipe.seed in baseline]
    if shared and first.recipe.method_name != BASELINE and metric != "macro_f1":
        ours = [row_counts(*_predictions(cell), metric) for cell in shared]
        theirs = [row_counts(*_predictions(baseline[cell.recipe.seed]), metric) for cell in shared]
        difference = paired_test(ours, theirs)
    return Entry(
        first.task,
        first.student,
        first.method,
        metric,
        "BiGRU" if first.recipe.student.architecture == "bigru" else "RoBERTa",
        summaries[0].student["parameters"],
        seeds,
        summaries,
        difference,
    )


def _predictions(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    found = load_file(Path(cell.recipe.output) / "predictions" / "test.safetensors")
    return found["logits"].numpy(), found["labels"].numpy()
