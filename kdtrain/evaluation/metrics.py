"""What a run writes down step by step: its metrics.jsonl, read again."""

import json
from pathlib import Path
from typing import Any

from kdtrain.files import write_atomic


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line that a crash cut short is left out."""
    return [line for line in map(_line, _lines(folder / "metrics.jsonl")) if line]


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines that were written after the checkpoint a run resumes from, and any that a crash cut short."""
    kept = [line for line in _lines(path) if _line(line).get("step", last_step + 1) <= last_step]
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _line(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
