"""Committed results into the README's table and two plots: `python -m benchmarks.publish`.

The README's lines between the two marks are written anew from the newest `<date>.csv` and `<date>-family.csv` of every device; the plots show
time and memory against the number of tokens, from the newest `<date>-sweep.csv`. A test holds the README to the files.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.contenders import LABELS, YARDSTICKS
from benchmarks.runner import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SWEPT = ("ours", "compile", "liger", "trl", "eager", "products")

Row = dict[str, str]


def newest(folder: Path, suffix: str = "") -> Path | None:
    """The file of the latest date, if there is one."""
    found = sorted(folder.glob(f"????-??-??{suffix}.csv"))
    return found[-1] if found else None


def read(path: Path) -> list[Row]:
    """The rows of one file of results."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[Row]) -> str:
    """One Markdown table a file: machine and date above it, one line a case and contender."""
    first = rows[0]
    lines = [
        f"{first['device']}, torch {first['torch']}, {first['date']}, commit {first['commit']}; "
        "loss and both gradients, mean over the counted rows:",
        "",
        "| case | contender | median s | peak extra MiB | error of the hidden gradient | x eager | x products |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        label = LABELS[row["contender"]]
        if row["cannot_run"]:
            lines.append(
                f"| {row['case']} | {label} | cannot run: {row['cannot_run'].replace('|', '/')} | | | | |"
            )
            continue
        peak = f"{int(row['peak_extra_bytes']) / 2**20:.0f}" if row["peak_extra_bytes"] else ""
        error = f"{float(row['hidden_grad_error']):.1e}" if row["hidden_grad_error"] else ""
        ratios = (f"{float(row[name]):.2f}" if row[name] else "" for name in ("times_eager", "times_floor"))
        seconds = f"{float(row['median_s']):.3f}"
        lines.append(f"| {row['case']} | {label} | {seconds} | {peak} | {error} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def family_table(rows: list[Row]) -> str:
    """One line a case: ours against eager, the bare products, and the same products with results in fresh memory."""
    first = rows[0]
    cases: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[row["case"]][row["contender"]] = row
    lines = [
        f"Every divergence and form of teacher ({first['device']}, {first['date']}, commit {first['commit']}), kdkernels only:",
        "",
        "| case | median s | peak extra MiB | of eager's | x eager | x products | x products, fresh memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, found in cases.items():
        ours, eager, plain = found["ours"], found["eager"], found["plain_products"]
        peak = int(ours["peak_extra_bytes"])
        floor, fresh = float(ours["times_floor"]), plain["times_floor"]
        lines.append(
            f"| {case} | {float(ours['median_s']):.3f} | {peak / 2**20:.0f} | {peak / int(eager['peak_extra_bytes']):.2f} "
            f"| {float(ours['times_eager']):.2f} | {floor:.2f} | {f'{floor / float(fresh):.2f}' if fresh else ''} |"
        )
    return "\n".join(lines)


def published() -> str:
    """What stands between the marks: every device with results, in alphabetical order."""
    found = []
    for folder in sorted(folder for folder in RESULTS.iterdir() if folder.is_dir()):
        for suffix, make in (("", table), ("-family", family_table)):
            path = newest(folder, suffix)
            if path is not None:
                found.append(make(read(path)))
    return "\n\n".join(found)


def into(text: str, content: str) -> str:
    """`text` with `content` between the marks."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"README.md must hold the lines {BEGIN} and {END}; put them where the table belongs")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def plot(rows: list[Row], column: str, unit: float, label: str, path: Path) -> None:
    """One line a contender against N, on logarithmic axes; the bare products are the floor."""
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row[column] and row["contender"] in SWEPT:
            points[row["contender"]].append((int(row["tokens"]), float(row[column]) / unit))
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for contender in SWEPT:
        if points[contender]:
            tokens, values = zip(*sorted(points[contender]), strict=True)
            style = "k--" if contender in YARDSTICKS else "o-"
            axes.plot(
                tokens, values, style, label=LABELS[contender], linewidth=2.5 if contender == "ours" else 1.2
            )
    ticks = sorted({int(row["tokens"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("tokens N")
    axes.set_ylabel(label)
    axes.set_title(f"{rows[0]['device']}, V = {rows[0]['vocabulary']}, {rows[0]['date']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Write the README's table and the plots."""
    readme = ROOT / "README.md"
    readme.write_text(into(readme.read_text(encoding="utf-8"), published()), encoding="utf-8")
    written = [readme]
    for folder in sorted(folder for folder in RESULTS.iterdir() if folder.is_dir()):
        sweep = newest(folder, "-sweep")
        if sweep is None:
            continue
        rows = read(sweep)
        for column, unit, label, name in (
            ("median_s", 1.0, "seconds, forward and backward", "time"),
            ("peak_extra_bytes", 2**20, "peak memory beyond the inputs, MiB", "memory"),
        ):
            path = PICTURES / f"{folder.name}_{name}_against_tokens.png"
            plot(rows, column, unit, label, path)
            written.append(path)
    print("written:", ", ".join(str(path.relative_to(ROOT)) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
