"""Committed results into the tables of docs/benchmarks.md and the plots: `python -m benchmarks.publish`.

The lines of that page between the two marks are written again from the newest files of every device: `<date>.csv` (everybody,
one table a shape), `<date>-family.csv` (ours in every form), `<date>-steps.csv` (whole training steps), and the rows in
which somebody is faster or leaner than ours. The plots come from `<date>-sweep.csv` and show time and memory against the
number of tokens. A test compares the page with the files.
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots import SWEPT, picture_path, plot
from benchmarks.registry import OPERATIONS
from benchmarks.report import mebibytes
from benchmarks.runner import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SHAPE = ("tokens", "width", "teacher_width", "vocabulary", "dtype", "rows", "classes")
PAGES = 2**20  # what a process holds is counted in pages and arenas: less than this is no difference

Row = dict[str, str]
Cases = dict[str, dict[str, Row]]  # by name of the case, by contender


def newest(folder: Path, suffix: str = "") -> Path | None:
    """The file of the latest date, if there is one."""
    found = sorted(folder.glob(f"????-??-??{suffix}.csv"))
    return found[-1] if found else None


def read(path: Path) -> list[Row]:
    """The rows of one file of results."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def family_of(row: Row) -> str:
    """The operation's key; files before there were several have linear_kd only."""
    return row.get("family") or row["operation"]


def label_of(row: Row) -> str:
    """The contender in words."""
    return OPERATIONS[family_of(row)].labels[row["contender"]]


def by_case(rows: list[Row]) -> Cases:
    """In the order of the file."""
    cases: Cases = defaultdict(dict)
    for row in rows:
        cases[row["case"]][row["contender"]] = row
    return cases


def stamp(row: Row) -> str:
    """Where and when."""
    return f"{row['device']}, torch {row['torch']}, {row['date']}, commit {row['commit']}"


def seconds(row: Row) -> str:
    """Median time with a unit that suits it."""
    value = float(row["median_s"])
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def cell(row: Row | None) -> str:
    """Time, memory, how far from the floor, and the error of the hidden states' gradient."""
    if row is None or row["cannot_run"]:
        return "-"
    peak = f", {mebibytes(int(row['peak_extra_bytes']))} MiB" if row["peak_extra_bytes"] else ""
    floor = f", {float(row['times_floor']):.2f} x" if row["times_floor"] else ""
    error = f", {float(row['hidden_grad_error']):.0e}" if row["hidden_grad_error"] else ""
    return f"{seconds(row)}{peak}{floor}{error}"


def short_name(row: Row) -> str:
    """What tells the cases of one shape apart."""
    masked = f", {float(row['masked']):.0%} masked" if float(row.get("masked") or 0) else ""
    teacher = row.get("teacher", "head") or "head"
    stored = f", teacher as {teacher}" if teacher not in ("head", "none") else ""
    named = {"linear_ce": "cross entropy", "kd": "forward_kl and cross entropy of given logits"}
    return named.get(family_of(row), row.get("divergence") or row["case"]) + masked + stored


def shape_of(cases: list[Row]) -> str:
    """The sizes that all cases of a table share."""
    first = next((row for row in cases if row.get("teacher") != "none"), cases[0])
    return first["case"].partition(",")[2].strip().partition(", 50%")[0].partition(", teacher as")[0]


def tables(rows: list[Row]) -> str:
    """Everybody: one table a shape, one line a contender, one column a case."""
    shapes: dict[tuple[str | None, ...], Cases] = defaultdict(dict)
    for name, found in by_case(rows).items():
        first = next(iter(found.values()))
        shapes[tuple(first.get(field) for field in SHAPE)][name] = found
    parts = [
        f"{stamp(rows[0])}. Loss and gradients: median time, peak memory beyond the inputs, time over that of the floor, "
        "and the relative error of the hidden states' gradient against fp64:"
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for cases in shapes.values():
        firsts = [next(iter(found.values())) for found in cases.values()]
        lines = [
            f"| {shape_of(firsts)} | {' | '.join(short_name(row) for row in firsts)} |",
            "|---|" + "---:|" * len(cases),
        ]
        labels: dict[str, list[Row]] = defaultdict(list)
        for found in cases.values():
            for row in found.values():
                labels[label_of(row)].append(row)
        for label, mine in labels.items():
            if all(row["cannot_run"] for row in mine):
                reasons[label].append(mine[0]["cannot_run"].partition(" (No module")[0])
                continue
            places = {row["case"]: row for row in mine}
            lines.append(f"| {label} | {' | '.join(cell(places.get(name)) for name in cases)} |")
        parts.append("\n".join(lines))
    if reasons:
        words = "; ".join(f"{label}: {' / '.join(dict.fromkeys(why))}" for label, why in reasons.items())
        parts.append(f"Not in these tables, and why: {words}.")
    return "\n\n".join(parts)


def family_table(rows: list[Row]) -> str:
    """One line a case: ours against eager, the bare products, and the same products with results in fresh memory."""
    lines = [
        f"Every divergence and form of teacher ({stamp(rows[0])}), kdkernels only:",
        "",
        "| case | median s | peak extra MiB | of eager's | x eager | x products | x products, fresh memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for found in by_case(rows).values():
        ours, eager, plain = found["ours"], found["eager"], found["plain_products"]
        peak = int(ours["peak_extra_bytes"])
        floor, fresh = float(ours["times_floor"]), plain["times_floor"]
        name = short_name(ours) + (f", {ours['mode']}" if ours["mode"] != "fast" else "")
        lines.append(
            f"| {name} | {float(ours['median_s']):.3f} | {peak / 2**20:.0f} | {peak / int(eager['peak_extra_bytes']):.2f} "
            f"| {float(ours['times_eager']):.2f} | {floor:.2f} | {f'{floor / float(fresh):.2f}' if fresh else ''} |"
        )
    return "\n".join(lines)


def step_tables(rows: list[Row]) -> str:
    """Whole training steps: tokens a second, memory, and time over that of plain training."""
    parts = [f"Whole training steps ({stamp(rows[0])}):"]
    for name, found in by_case(rows).items():
        lines = [
            f"| {name} | step | tokens/s | peak extra MiB | x plain training |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in found.values():
            if row["cannot_run"]:
                lines.append(f"| {label_of(row)} | cannot run: {row['cannot_run']} | | | |")
                continue
            peak = mebibytes(int(row["peak_extra_bytes"])) if row["peak_extra_bytes"] else ""
            rate, ratio = float(row["tokens_per_second"]), float(row["times_floor"])
            lines.append(f"| {label_of(row)} | {seconds(row)} | {rate:.0f} | {peak} | {ratio:.2f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def losses(rows: list[Row]) -> list[str]:
    """Every case in which a contender that computes the same is faster or leaner than ours, in words."""
    found = []
    for name, contenders in by_case(rows).items():
        ours = contenders.get("ours")
        if ours is None or ours["cannot_run"]:
            continue
        yardsticks = OPERATIONS[family_of(ours)].yardsticks
        for contender, row in contenders.items():
            if contender in yardsticks or contender == "ours" or row["cannot_run"]:
                continue
            better = []
            # Ratios within a round where there are any: a slow spell of the machine falls on both.
            column = "times_floor" if row["times_floor"] and ours["times_floor"] else "median_s"
            if float(row[column]) < float(ours[column]):
                words = [
                    f"{float(one[column]):.2f} x the floor" if column == "times_floor" else seconds(one)
                    for one in (row, ours)
                ]
                better.append(f"faster ({words[0]} against {words[1]})")
            saved = int(ours["peak_extra_bytes"] or 0) - int(row["peak_extra_bytes"] or 0)
            if row["peak_extra_bytes"] and saved > PAGES:
                mine, theirs = (mebibytes(int(one["peak_extra_bytes"])) for one in (ours, row))
                better.append(f"leaner ({theirs} MiB against {mine} MiB)")
            if better:
                found.append(f"{name}: {label_of(row)} is {' and '.join(better)}")
    return found


def published() -> str:
    """What stands between the marks: every device with results, in alphabetical order."""
    found = []
    for folder in sorted(folder for folder in RESULTS.iterdir() if folder.is_dir()):
        beaten: list[str] = []
        for suffix, make in (("", tables), ("-family", family_table), ("-steps", step_tables)):
            path = newest(folder, suffix)
            if path is not None:
                rows = read(path)
                found.append(make(rows))
                beaten += losses(rows)
        lines = [f"- {line}" for line in beaten] or ["- nobody, in no case"]
        found.append("\n".join(["Who is faster or leaner than kdkernels, and where:", "", *lines]))
        pictures = [
            f"![{column} against tokens]({path.relative_to(PAGE.parent)})"
            for column in SWEPT
            if (path := picture_path(folder.name, column)).exists()
        ]
        if pictures:
            found.append("\n".join(pictures))
    return "\n\n".join(found)


def into(text: str, content: str) -> str:
    """`text` with `content` between the marks."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(
            f"docs/benchmarks.md must hold the lines {BEGIN} and {END}; put them where the table belongs"
        )
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(words: Sequence[str] | None = None) -> int:
    """Write the plots and the tables of docs/benchmarks.md."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.publish",
        description="Makes the tables of docs/benchmarks.md and the pictures from the newest results in benchmarks/results.",
    ).parse_args(words)
    written = []
    for folder in sorted(folder for folder in RESULTS.iterdir() if folder.is_dir()):
        sweep = newest(folder, "-sweep")
        if sweep is not None:
            for column in SWEPT:
                path = picture_path(folder.name, column)
                plot(read(sweep), column, path)
                written.append(path)
    PAGE.write_text(into(PAGE.read_text(encoding="utf-8"), published()), encoding="utf-8")
    written.append(PAGE)
    print("written:", ", ".join(str(path.relative_to(ROOT)) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
