"""A study on paper: report.md, report.html (one file, figures inside), runs.csv, table.csv, two SVGs."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from kdtrain.files import human_bytes, write_atomic
from kdtrain.study.costs import Cost
from kdtrain.study.figures import metric_over_size, retained_over_size
from kdtrain.study.results import Entry, TaskResult
from kdtrain.summary import installed_versions

NAMES = {"accuracy": "accuracy", "f1": "F1", "top3": "top-3", "macro_f1": "macro F1"}


class Best(str):
    """A cell that holds the best figure of its student."""


@dataclass(frozen=True)
class Table:
    """Headers and cells, as text."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub table under its title."""
        cells = [[_markdown(cell) for cell in row] for row in (self.headers, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(self.headers), *cells[1:])]
        return f"## {_markdown(self.title)}\n\n" + "\n".join(lines)


def write_report(name: str, tasks: Sequence[TaskResult], costs: Sequence[Cost], folder: Path) -> str:
    """Write report.md, report.html, runs.csv, table.csv and the figures into `folder`; return the Markdown."""
    metric_over_size(tasks, folder / "metric_over_size.svg")
    figures = {"metric_over_size.svg": "Test metric over parameters"}
    if retained_over_size(tasks, folder / "retained_over_size.svg"):
        figures["retained_over_size.svg"] = "Share of the teacher's metric over share of its parameters"
    tables = [results_table(task) for task in tasks]
    tables += [methods_table(tasks), training_table(tasks), *([costs_table(costs)] if costs else [])]
    head = introduction(tasks)
    text = "\n\n".join(
        [
            f"# {_markdown(name)}",
            head,
            *(table.markdown() for table in tables),
            *(f"![{title}]({file})" for file, title in figures.items()),
        ]
    )
    drawn = [(title, _inline(folder / file, number)) for number, (file, title) in enumerate(figures.items())]
    page = _page().render(name=name, introduction=head, tables=tables, figures=drawn)
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
        "Means over seeds ± standard deviation. The difference to labels only (FT) is paired: a bootstrap resamples "
        "seeds and test rows, the same for both. Brackets are 95 % intervals, p is two-sided. Retained is the share "
        "of the teacher's metric."
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
                Best(figure) if entry.mean() == best[entry.student] else figure,
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
    # A spreadsheet would run text that begins like a formula.
    formula = ("=", "+", "-", "@", "\t", "\r")
    writer.writerows(
        {
            name: f"'{value}" if isinstance(value, str) and value.startswith(formula) else value
            for name, value in line.items()
        }
        for line in lines
    )
    return text.getvalue()


def _markdown(cell: str) -> str:
    """Text that Markdown, HTML in it and its formulas leave alone."""
    text = "".join(f"\\{sign}" if sign in r"\|*`$<" else sign for sign in " ".join(cell.split()))
    return f"**{text}**" if isinstance(cell, Best) else text


def _page() -> Template:
    environment = Environment(
        loader=PackageLoader("kdtrain.study", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.tests["best"] = lambda cell: isinstance(cell, Best)
    return environment.get_template("report.html.j2")


def _inline(path: Path, number: int) -> str:
    """An SVG file as an element of a page that holds several: their ids must differ."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>figure{number}-", svg)
