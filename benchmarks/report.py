"""Rows into a Markdown table for people and CSV + JSON for programs."""

import csv
import json
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import LABELS, YARDSTICKS
from benchmarks.measure import quartiles
from benchmarks.runner import Row

Record = dict[str, Any]


def _ratio(row: Row, base: Row | None) -> float | None:
    """Median of the ratios within each round: what slows a whole round down cancels out."""
    if base is None or row.cannot_run or base.cannot_run:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(row.seconds, base.seconds, strict=True))


def records(case: Case, rows: list[Row]) -> list[Record]:
    """One flat record a contender."""
    by_name = {row.contender: row for row in rows}
    found = []
    for row in rows:
        lower, middle, upper = quartiles(row.seconds) if row.seconds else (None, None, None)
        found.append(
            {
                "case": case.name,
                **case.as_dict(),
                "contender": row.contender,
                "rounds": len(row.seconds),
                "median_s": middle,
                "lower_quartile_s": lower,
                "upper_quartile_s": upper,
                "times_floor": _ratio(row, by_name.get("products")),
                "times_eager": _ratio(row, by_name.get("eager")),
                "peak_extra_bytes": None if row.contender in YARDSTICKS else row.peak_bytes,
                "loss_error": row.errors.get("loss_error"),
                "hidden_grad_error": row.errors.get("hidden_error"),
                "weight_grad_error": row.errors.get("weight_error"),
                "cannot_run": row.cannot_run,
            }
        )
    return found


def markdown(case_records: list[Record]) -> str:
    """The table of one case; `x floor` ends each row because it is the figure that carries to other machines."""
    lines = [
        "| | median s | quartiles s | peak extra MiB | loss error | dX error | dW error | x eager | x floor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in case_records:
        label = LABELS[record["contender"]]
        if record["cannot_run"]:
            lines.append(f"| {label} | cannot run: {record['cannot_run'].replace('|', '/')} | | | | | | | |")
            continue
        lines.append(
            f"| {label} | {record['median_s']:.3f} "
            f"| {record['lower_quartile_s']:.3f} to {record['upper_quartile_s']:.3f} "
            f"| {_cell(record['peak_extra_bytes'], lambda value: f'{value / 2**20:.0f}')} "
            f"| {_cell(record['loss_error'], _scientific)} | {_cell(record['hidden_grad_error'], _scientific)} "
            f"| {_cell(record['weight_grad_error'], _scientific)} | {_cell(record['times_eager'], _two_digits)} "
            f"| {_cell(record['times_floor'], _two_digits)} |"
        )
    return "\n".join(lines)


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
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*all_records[0], *stamp], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**record, **stamp} for record in all_records)
    os.replace(scratch, table)
    scratch.write_text(
        json.dumps({"environment": environment, "rows": all_records}, indent=1) + "\n", encoding="utf-8"
    )
    os.replace(scratch, whole)
    return table, whole
