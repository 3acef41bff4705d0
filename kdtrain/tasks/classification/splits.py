"""Classification data: a folder with dataset.json and JSONL files, or plain files with a column mapping."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdtrain.errors import KdtrainError
from kdtrain.outputs import IGNORED
from kdtrain.recipe import DataSection
from kdtrain.tasks.classification.rows import Columns, TextRows, read_file, read_jsonl, read_rows

METRICS = ("accuracy", "f1", "top3", "macro_f1")
"""What a task may be measured by first; `metric` in dataset.json."""


@dataclass(frozen=True)
class ClassificationData:
    """A whole data set."""

    name: str
    classes: tuple[str, ...]
    focus: str | None
    train: TextRows
    valid: TextRows
    test: TextRows
    unlabelled: TextRows
    metric: str = "accuracy"
    """the task's own headline figure, a name out of `METRICS`"""

    @property
    def pairs(self) -> bool:
        """Whether a row is two texts."""
        return self.train.seconds is not None

    def fingerprint(self) -> str:
        """A hash of every text, label and class name: equal data, equal fingerprint, wherever it lies."""
        digest = hashlib.sha256(json.dumps([self.classes, self.focus]).encode())
        for rows in (self.train, self.valid, self.test, self.unlabelled):
            digest.update(f"{len(rows)}\n".encode())
            digest.update("".join(rows.keys()).encode())
            digest.update(rows.labels.numpy().tobytes())
        return digest.hexdigest()[:32]


def load_classification(recipe: DataSection) -> ClassificationData:
    """Read the data set that a recipe names.

    Raises:
        KdtrainError: a missing file or column, an unreadable line, or a label outside the classes, with its place.
    """
    if recipe.path is not None:
        data = _load_folder(Path(recipe.path), recipe)
    else:
        columns = Columns(recipe.text, recipe.label, recipe.second)
        splits = {}
        for name in ("train", "valid", "test", "unlabelled"):
            given = getattr(recipe, name)
            splits[name] = (
                _no_rows(recipe.second is not None)
                if given is None
                else read_file(Path(given), columns, recipe.classes, name != "unlabelled")
            )
        splits["test"] = splits["test"] if recipe.test else splits["valid"]
        data = ClassificationData(str(recipe.train), recipe.classes, recipe.focus, **splits)
    if recipe.limit is not None:
        keys = data.train.keys()
        kept = sorted(range(len(keys)), key=lambda i: (keys[i], i))[: recipe.limit]
        data = replace(data, train=data.train.select(sorted(kept)))
    for name in ("train", "valid", "test"):
        rows: TextRows = getattr(data, name)
        if not len(rows):
            raise KdtrainError(f"the {name} split of {data.name} has no rows")
        if name != "train" and bool((rows.labels == IGNORED).any()):
            raise KdtrainError(
                f"the {name} split of {data.name} has rows without a label; only training rows may"
            )
    return data


def _load_folder(folder: Path, recipe: DataSection) -> ClassificationData:
    try:
        about = json.loads((folder / "dataset.json").read_text())
    except FileNotFoundError:
        raise KdtrainError(f"{folder} is no data set: it has no dataset.json") from None
    except (OSError, ValueError) as error:
        raise KdtrainError(f"{folder / 'dataset.json'} is not readable JSON: {error}") from None
    if not isinstance(about, dict):
        raise KdtrainError(f"{folder / 'dataset.json'} must hold a JSON object, got {type(about).__name__}")
    if about.get("task") != "classification":
        raise KdtrainError(
            f"{folder} holds the task {about.get('task')!r}; only 'classification' can be trained"
        )
    named = about.get("classes")
    if not isinstance(named, list) or len(set(map(str, named))) < max(2, len(named)):
        raise KdtrainError(
            f"{folder / 'dataset.json'}: classes must be a list of different names, at least two, got {named!r}"
        )
    classes = tuple(map(str, named))
    metric = about.get("metric", "accuracy")
    if metric not in METRICS or (metric == "f1" and len(classes) != 2):
        raise KdtrainError(
            f"{folder / 'dataset.json'}: metric must be one of {', '.join(METRICS)} (f1 for two classes), got {metric!r}"
        )
    columns = Columns(
        about.get("text", recipe.text),
        about.get("label", recipe.label),
        about.get("second", recipe.second),
        read_table(folder / about["table"]) if "table" in about else None,
    )

    def read(name: str, labelled: bool) -> TextRows:
        path = folder / f"{name}.jsonl"
        if not labelled and not path.exists():
            return _no_rows(columns.second is not None)
        return read_rows(read_jsonl(path), columns, classes, labelled)

    return ClassificationData(
        name=about.get("name", folder.name),
        classes=classes,
        focus=recipe.focus or about.get("focus"),
        train=read("train", True),
        valid=read("valid", True),
        test=read("test", True),
        unlabelled=read("unlabelled", False),
        metric=metric,
    )


def read_table(path: Path) -> dict[str, str]:
    """Texts by id, out of a code table: lines with `id` (or `idx`) and `code` (or `func`)."""
    table = {}
    for place, row in read_jsonl(path):
        name, text = row.get("id", row.get("idx")), row.get("code", row.get("func"))
        if name is None or not isinstance(text, str) or not text.strip():
            raise KdtrainError(f"{place} must hold an id and code (columns: {', '.join(row)})")
        table[str(name)] = text
    return table


def _no_rows(pairs: bool) -> TextRows:
    return TextRows([], torch.zeros(0, dtype=torch.int64), [] if pairs else None)
