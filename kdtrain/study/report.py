"""A study on paper: report.md, report.html (one file, pictures inside), runs.csv, table.csv, two PNGs."""

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from kdtrain.files import human_bytes, write_atomic
from kdtrain.study.costs import Cost
from kdtrain.study.figures import metric_over_size, retained_over_size
from kdtrain.study.results import Entry, TaskResult
from kdtrain.summary import installed_versions

NAMES = {"accuracy": "accuracy", "f1": "F1", "top3": "top-3", "macro_f1": "macro F1"}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f4f4f4}"
)


@dataclass(frozen=True)
class Table:
    """Headers and cells, as text."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub table under its title."""
        lines = [f"| {' | '.join(row)} |" for row in (self.headers, ("---",) * len(self.headers), *self.rows)]
        return f"## {self.title}\n\n" + "\n".join(lines)

    def html(self) -> str:
        """The same as HTML."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.headers)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell).replace('**', '')}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<h2>{html.escape(self.title)}</h2><table><tr>{head}</tr>{body}</table>"


def write_report(name: str, tasks: Sequence[TaskResult], costs: Sequence[Cost], folder: Path) -> str:
    """Write everything into `folder`; give the Markdown."""
    metric_over_size(tasks, folder / "metric_over_size.png")
    pictures = ["metric_over_size.png"]
    if retained_over_size(tasks, folder / "retained_over_size.png"):
        pictures.append("retained_over_size.png")
    tables = [results_table(task) for task in tasks]
    tables += [methods_table(tasks), training_table(tasks), *([costs_table(costs)] if costs else [])]
    head = introduction(tasks)
    text = "\n\n".join(
        [
            f"# {name}",
            head,
            *(table.markdown() for table in tables),
            *(f"![{one}]({one})" for one in pictures),
        ]
    )
    page = "".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(name)}</title><style>{STYLE}</style>",
            f"<h1>{html.escape(name)}</h1><p>{html.escape(head)}</p>",
            *(table.html() for table in tables),
            *(
                f"<p><img alt='{one}' src='data:image/png;base64,{_base64(folder / one)}'></p>"
                for one in pictures
            ),
            "</html>",
        ]
    )
    write_atomic(folder / "report.md", text + "\n")
    write_atomic(folder / "report.html", page + "\n")
    write_atomic(folder / "runs.csv", _csv(run_lines(tasks)))
    write_atomic(folder / "table.csv", _csv(table_lines(tasks)))
    return text + "\n"


def introduction(tasks: Sequence[TaskResult]) -> str:
    """What the tables show, in a few sentences."""
    versions = installed_versions()
    seeds = sorted({seed for task in tasks for entry in task.entries for seed in entry.seeds})
    devices = sorted(
        {one.training["device"] for task in tasks for entry in task.entries for one in entry.summaries}
    )
    return (
        f"{date.today().isoformat()}, torch {versions['torch']}, trained on {', '.join(devices)}; seeds {', '.join(map(str, seeds))}. "
        "Means over seeds and, behind ±, their standard deviation. The difference to labels only (FT) is paired: "
        f"a bootstrap draws seeds and test rows anew together, the same for both; brackets hold 95 % of "
        "it, p is two-sided. Retained is the share of the teacher's own figure."
    )


def results_table(task: TaskResult) -> Table:
    """One task: every student under every method."""
    others = [name for name in ("accuracy", "f1", "top3", "macro_f1") if name != task.metric]
    known = task.entries[0].summaries[0].metrics
    others = [name for name in others if name in known and not (name == "top3" and "f1" in known)]
    agreement = all("agreement" in one.metrics for entry in task.entries for one in entry.summaries)
    headers = ["student", "method", "parameters", NAMES[task.metric], "against FT", "p", "retained"]
    headers += [NAMES[name] for name in others] + (["agrees with teacher"] if agreement else [])
    best = {
        student: max(entry.mean() for entry in task.entries if entry.student == student)
        for student in dict.fromkeys(entry.student for entry in task.entries)
    }
    rows = []
    if task.teacher is not None:
        test = task.teacher["test"]
        row = [
            "teacher",
            "",
            f"{task.teacher['parameters'] / 1e6:.2f} M",
            f"{100 * test[task.metric]:.1f}",
            "",
            "",
            "",
        ]
        rows.append((*row, *(f"{100 * test[name]:.1f}" for name in others), *([""] if agreement else [])))
    for entry in task.entries:
        figure = f"{100 * entry.mean():.1f} ± {100 * entry.deviation():.1f}"
        retained, change = task.retained(entry), entry.difference
        rows.append(
            (
                entry.student,
                entry.method,
                f"{entry.parameters / 1e6:.2f} M",
                f"**{figure}**" if entry.mean() == best[entry.student] else figure,
                ""
                if change is None
                else f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
                "" if change is None else "< 0.001" if change.p < 0.001 else f"{change.p:.3f}",
                "" if retained is None else f"{100 * retained:.1f} %",
                *(f"{100 * entry.mean(name):.1f}" for name in others),
                *([f"{100 * entry.mean('agreement'):.1f}"] if agreement else []),
            )
        )
    title = f"{task.name}: {NAMES[task.metric]} on {task.test_rows:,} test rows, largest class {100 * task.majority:.1f} %"
    return Table(title, tuple(headers), tuple(rows))


def methods_table(tasks: Sequence[TaskResult]) -> Table:
    """Every method over all students and tasks: how far from FT, how often better, and the best of how many."""
    compared = [entry for task in tasks for entry in task.entries if entry.difference is not None]
    best: dict[tuple[str, str], Entry] = {}
    for entry in (entry for task in tasks for entry in task.entries):
        known = best.setdefault((entry.task, entry.student), entry)
        if entry.mean() > known.mean():
            best[entry.task, entry.student] = entry
    rows = []
    for method in dict.fromkeys(entry.method for entry in compared):
        changes = [
            (entry, entry.difference) for entry in compared if entry.method == method and entry.difference
        ]
        means = [100 * change.mean for _, change in changes]
        by_kind = [
            [100 * change.mean for entry, change in changes if entry.architecture == architecture]
            for architecture in ("RoBERTa", "BiGRU")
        ]
        rows.append(
            (
                method,
                str(len(changes)),
                f"{sum(means) / len(means):+.1f}",
                *(f"{sum(kind) / len(kind):+.1f}" if kind else "" for kind in by_kind),
                str(sum(change.mean > 0 for _, change in changes)),
                str(sum(change.low > 0 for _, change in changes)),
                str(sum(change.high < 0 for _, change in changes)),
                str(sum(one.method == method for one in best.values())),
            )
        )
    headers = ("method", "students and tasks", "points over FT", "of RoBERTa", "of BiGRU", "higher")
    headers += ("95 % above 0", "95 % below 0", "best of all methods")
    return Table("The methods over all students and tasks", headers, tuple(rows))


def training_table(tasks: Sequence[TaskResult]) -> Table:
    """What the training of one run took. Memory on a GPU only: on the CPU a worker's peak is that of all its runs."""
    entries = [entry for task in tasks for entry in task.entries]
    on_gpu = all(one.training["device"].startswith("cuda") for entry in entries for one in entry.summaries)
    rows = tuple(
        (
            f"{entry.task}, {entry.student}",
            entry.method,
            f"{entry.cost('steps'):.0f}",
            f"{entry.cost('seconds'):.1f}",
            f"{entry.cost('tokens_per_second'):,.0f}",
            *([human_bytes(entry.cost("peak_memory_bytes"))] if on_gpu else []),
        )
        for entry in entries
    )
    headers = (
        "task, student",
        "method",
        "steps",
        "seconds",
        "tokens/s",
        *(["peak memory"] if on_gpu else []),
    )
    return Table("Training cost of one run (the teacher's outputs come from the cache)", headers, rows)


def costs_table(costs: Sequence[Cost]) -> Table:
    """What each model takes to use."""
    rows = tuple(
        (
            f"{cost.task}, {cost.student}",
            cost.device + (f", {cost.threads} threads" if cost.device == "cpu" else ""),
            f"{cost.latency_ms:.2f}",
            f"{cost.rows_per_second:,.0f}",
            human_bytes(cost.memory_bytes),
        )
        for cost in costs
    )
    headers = ("task, model", "device", "ms a row", "rows/s in batches of 32", "memory beyond the libraries")
    return Table("Inference, float32", headers, rows)


def run_lines(tasks: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One line a run, for runs.csv."""
    return [
        {
            "task": entry.task,
            "student": entry.student,
            "architecture": entry.architecture,
            "method": entry.method,
            "seed": summary.seed,
            "parameters": entry.parameters,
            **{f"test_{name}": value for name, value in summary.metrics.items() if isinstance(value, float)},
            **{f"valid_{name}": value for name, value in summary.valid.items() if isinstance(value, float)},
            **{
                name: summary.training[name]
                for name in ("steps", "best_step", "seconds", "tokens_per_second")
            },
        }
        for task in tasks
        for entry in task.entries
        for summary in entry.summaries
    ]


def table_lines(tasks: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One line a cell, for table.csv."""
    return [_table_line(task, entry) for task in tasks for entry in task.entries]


def _table_line(task: TaskResult, entry: Entry) -> dict[str, Any]:
    change = entry.difference
    return {
        "task": entry.task,
        "student": entry.student,
        "architecture": entry.architecture,
        "method": entry.method,
        "parameters": entry.parameters,
        "metric": entry.metric,
        "seeds": len(entry.seeds),
        "mean": entry.mean(),
        "deviation": entry.deviation(),
        "difference": None if change is None else change.mean,
        "difference_low": None if change is None else change.low,
        "difference_high": None if change is None else change.high,
        "p": None if change is None else change.p,
        "retained": task.retained(entry),
    }


def _csv(lines: list[dict[str, Any]]) -> str:
    headers = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, headers, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
