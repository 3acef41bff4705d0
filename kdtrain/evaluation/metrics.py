"""What a run writes down step by step: its metrics.jsonl, read again."""

import json
from pathlib import Path
from typing import Any

from kdtrain.files import write_atomic


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_at(folder: Path, step: int) -> dict[str, float]:
    """The validation metrics of the given step, as a run's metrics.jsonl has them."""
    lines = [line for line in read_metrics(folder) if line["step"] == step]
    found = {name: value for line in lines for name, value in line.items() if name.startswith("valid/")}
    return {name.removeprefix("valid/"): value for name, value in found.items()}


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines that were written after the checkpoint a run goes on from."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last_step]
    write_atomic(path, "".join(f"{line}\n" for line in kept))
