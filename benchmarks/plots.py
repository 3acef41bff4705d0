"""Two pictures of a sweep: time and memory against the number of tokens, the floor drawn."""

from collections import defaultdict
from pathlib import Path

from benchmarks.linear_kd import OPERATION
from benchmarks.runner import ROOT

PICTURES = ROOT / "docs" / "pictures"
# By the name of the picture: the column of the results, its unit, and the words at the axis.
SWEPT = {
    "time": ("median_s", 1.0, "seconds, forward and backward"),
    "memory": ("peak_extra_bytes", 2.0**20, "peak memory beyond the inputs, MiB"),
}


def picture_path(device: str, name: str) -> Path:
    """Where a picture of a device's sweep lies."""
    return PICTURES / f"{device}_{name}_against_tokens.png"


def plot(rows: list[dict[str, str]], name: str, path: Path) -> None:
    """One line a contender against N: memory on linear axes, time on logarithmic ones; the bare matmuls are the floor."""
    import matplotlib.pyplot as plt

    column, unit, words = SWEPT[name]
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row[column] and row["contender"] not in ("copy", "plain_products"):
            points[row["contender"]].append((int(row["tokens"]), float(row[column]) / unit))
    figure, axes = plt.subplots(figsize=(7.6, 4.0), layout="constrained")
    for contender in OPERATION.contenders:
        if points[contender]:
            tokens, values = zip(*sorted(points[contender]), strict=True)
            style = "k--" if contender in OPERATION.yardsticks else "o-"
            width = 2.5 if contender == "ours" else 1.2
            axes.plot(tokens, values, style, label=OPERATION.labels[contender], linewidth=width)
    ticks = sorted({int(row["tokens"]) for row in rows})
    if name == "time":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    else:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("tokens N")
    axes.set_ylabel(words)
    axes.set_title(f"{rows[0]['device']}, V = {rows[0]['vocabulary']}, {rows[0]['date']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
