"""Rows into a Markdown table for people and CSV + JSON for programs."""

import csv
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import quartiles
from benchmarks.operation import AnyCase, Operation
from benchmarks.registry import OPERATIONS, operation_of
from benchmarks.runner import Row

Record = dict[str, Any]


def _ratio(row: Row, base: Row | None) -> float | None:
    """Median of the ratios within each round: what slows a whole round down cancels out."""
    if base is None or row.cannot_run or base.cannot_run:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(row.seconds, base.seconds, strict=True))


def records(case: AnyCase, rows: list[Row]) -> list[Record]:
    """One flat record a contender."""
    operation, by_name = operation_of(case), {row.contender: row for row in rows}
    floor = by_name.get(operation.floor) if operation.floor else None
    found = []
    for row in rows:
        lower, middle, upper = quartiles(row.seconds) if row.seconds else (None, None, None)
        found.append(
            {
                "case": case.name,
                "family": case.family,
                **case.as_dict(),
                "contender": row.contender,
                "rounds": len(row.seconds),
                "median_s": middle,
                "lower_quartile_s": lower,
                "upper_quartile_s": upper,
                "times_floor": _ratio(row, floor),
                "times_eager": _ratio(row, by_name.get("eager")),
                "peak_extra_bytes": None if row.contender in operation.yardsticks else row.peak_bytes,
                "loss_error": row.errors.get("loss_error"),
                "hidden_grad_error": row.errors.get("hidden_grad_error"),
                "weight_grad_error": row.errors.get("weight_grad_error"),
                "tokens_per_second": operation.tokens(case) / middle if operation.tokens and middle else None,
                "cannot_run": row.cannot_run,
            }
        )
    return found


Column = tuple[str, Callable[[Record], str]]


def _columns(operation: Operation) -> list[Column]:
    """What the table of an operation shows of a contender, the figure that carries to other machines last."""
    columns: list[Column] = [
        ("median s", lambda record: _seconds(record["median_s"])),
        (
            "quartiles s",
            lambda record: (
                f"{_seconds(record['lower_quartile_s'])} to {_seconds(record['upper_quartile_s'])}"
            ),
        ),
        ("peak extra MiB", lambda record: _cell(record["peak_extra_bytes"], mebibytes)),
    ]
    if operation.tokens:
        columns.append(
            ("tokens/s", lambda record: _cell(record["tokens_per_second"], lambda rate: f"{rate:.0f}"))
        )
    if operation.truth:
        for name, field in (("loss", "loss_error"), ("dX", "hidden_grad_error"), ("dW", "weight_grad_error")):
            columns.append((f"{name} error", lambda record, field=field: _cell(record[field], _scientific)))
    if "eager" in operation.contenders:
        columns.append(("x eager", lambda record: _cell(record["times_eager"], _two_digits)))
    if operation.floor:
        columns.append((operation.floor_name, lambda record: _cell(record["times_floor"], _two_digits)))
    return columns


def markdown(case_records: list[Record]) -> str:
    """The table of one case."""
    operation = OPERATIONS[case_records[0]["family"]]
    columns = _columns(operation)
    lines = [f"| | {' | '.join(name for name, _ in columns)} |", "|---|" + "---:|" * len(columns)]
    for record in case_records:
        label = operation.labels[record["contender"]]
        if record["cannot_run"]:
            reason = record["cannot_run"].replace("|", "/")
            lines.append(f"| {label} | cannot run: {reason} |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {label} | {' | '.join(make(record) for _, make in columns)} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def mebibytes(value: float) -> str:
    """Bytes in MiB, with a digit more where they are few."""
    return f"{value / 2**20:.0f}" if value >= 10 * 2**20 else f"{value / 2**20:.1f}"


def _scientific(value: float) -> str:
    return f"{value:.1e}"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"


def _cell(value: Any, form: Any) -> str:
    return "" if value is None else form(value)


def write(folder: Path, name: str, environment: Record, all_records: list[Record]) -> tuple[Path, Path]:
    """Write <name>.csv and <name>.json, each whole or not at all; called after every case, so a cut run keeps its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    table, whole = folder / f"{name}.csv", folder / f"{name}.json"
    stamp = {
        name: environment[name] for name in ("device", "threads", "load_before", "torch", "commit", "date")
    }
    scratch = folder / f".{name}.partial"
    # Cases differ in theirs.
    fields = list(dict.fromkeys(field for record in all_records for field in record))
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*fields, *stamp], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**record, **stamp} for record in all_records)
    os.replace(scratch, table)
    scratch.write_text(
        json.dumps({"environment": environment, "rows": all_records}, indent=1) + "\n", encoding="utf-8"
    )
    os.replace(scratch, whole)
    return table, whole
