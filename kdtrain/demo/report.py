"""The demo's table (Markdown and JSON) and its two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtrain.evaluation.measure import bootstrap_interval, paired_difference
from kdtrain.files import human_bytes, write_atomic, write_json
from kdtrain.plots import accuracy_intervals, learning_curves
from kdtrain.summary import installed_versions
from kdtrain.tasks.classification.metrics import classification_metrics
from kdtrain.tasks.classification.splits import ClassificationData


@dataclass(frozen=True)
class Entry:
    """One line of the table: the logits (rows, C) of each seed on the same test rows, and what the model costs."""

    name: str
    logits: Sequence[Tensor]
    labels: Tensor
    teacher_logits: Tensor | None = None
    parameters: int | None = None
    size: int | None = None
    """bytes of the folder on disk"""
    latency_ms: float | None = None
    seconds: float | None = None
    """training time of one seed"""

    def correct(self) -> np.ndarray:
        """(rows,) share of the seeds that are right."""
        right = torch.stack([logits.argmax(dim=1) == self.labels for logits in self.logits])
        return right.double().mean(dim=0).numpy()

    def metrics(self) -> dict[str, Any]:
        """Means over the seeds; the interval is a bootstrap over the rows."""
        seeds = [classification_metrics(logits, self.labels, self.teacher_logits) for logits in self.logits]
        low, high = bootstrap_interval(self.correct())
        return {
            **{name: float(np.mean([one[name] for one in seeds])) for name in seeds[0]},
            "accuracy_interval": [low, high],
            "accuracy_of_seeds": [one["accuracy"] for one in seeds],
            "parameters": self.parameters,
            "bytes": self.size,
            "latency_ms": self.latency_ms,
            "train_seconds": self.seconds,
        }


def write_report(
    output: Path, data: ClassificationData, entries: Sequence[Entry], runs: Mapping[str, Path]
) -> str:
    """Write report.md, report.json, accuracy_intervals.png and learning_curves.png; give the Markdown."""
    measured = {entry.name: entry.metrics() for entry in entries}
    names = list(runs)
    differences = {
        f"{name} - {names[0]}": paired_difference(
            _entry(entries, name).correct(), _entry(entries, names[0]).correct()
        )
        for name in names[1:]
    }
    seeds = len(_entry(entries, names[0]).logits)
    majority = float(torch.bincount(data.test.labels).max() / len(data.test))
    versions = installed_versions()
    lines = [
        f"# Exception classification, {date.today().isoformat()}",
        "",
        f"{len(data.train):,} training rows, {len(data.unlabelled):,} unlabelled, {len(data.valid):,} validation, "
        f"{len(data.test):,} test; {len(data.classes)} classes, the largest has {majority:.1%} of the test rows. "
        f"{_count(seeds, 'seed')} a method, {_count(torch.get_num_threads(), 'thread')}, "
        f"torch {versions['torch']}. Brackets: 95 % bootstrap over the test rows.",
        "",
        "| model | parameters | on disk | accuracy | top-3 | macro F1 | agrees with teacher | ms a function | trained in |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(name, metrics) for name, metrics in measured.items()),
        "",
        *(
            f"- {name}: {100 * mean:+.1f} points of accuracy [{100 * low:+.1f}, {100 * high:+.1f}] (paired)"
            for name, (mean, low, high) in differences.items()
        ),
        "",
        f"Pictures: {output / 'accuracy_intervals.png'}, {output / 'learning_curves.png'}. "
        f"Students to load with AutoModelForSequenceClassification: {output / 'runs'}/*/student",
    ]
    accuracy_intervals(measured, output / "accuracy_intervals.png")
    learning_curves(runs, output / "learning_curves.png")
    write_json(
        output / "report.json",
        {"models": measured, "differences": differences, "data": data.fingerprint(), "versions": versions},
    )
    text = "\n".join(lines) + "\n"
    write_atomic(output / "report.md", text)
    return text


def _entry(entries: Sequence[Entry], name: str) -> Entry:
    return next(entry for entry in entries if entry.name == name)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _row(name: str, metrics: Mapping[str, Any]) -> str:
    low, high = metrics["accuracy_interval"]
    cells = [
        name,
        "" if metrics["parameters"] is None else f"{metrics['parameters'] / 1e6:.2f} M",
        "" if metrics["bytes"] is None else human_bytes(metrics["bytes"]),
        f"{metrics['accuracy']:.1%} [{low:.1%}, {high:.1%}]",
        f"{metrics['top3']:.1%}",
        f"{metrics['macro_f1']:.3f}",
        f"{metrics['agreement']:.1%}" if "agreement" in metrics else "",
        "" if metrics["latency_ms"] is None else f"{metrics['latency_ms']:.1f}",
        "" if metrics["train_seconds"] is None else f"{metrics['train_seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"
