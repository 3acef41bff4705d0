"""Classification data: a folder with dataset.json and JSONL files, or plain files with a column mapping."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.recipe import DataRecipe

UNLABELLED = -100
"""The label of a row without one; the cross-entropy does not count it."""

FORMATS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextRows:
    """One split as it stands on disk."""

    texts: list[str]
    labels: Tensor
    """(rows,) int64, `UNLABELLED` where there is none"""

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self) -> list[str]:
        """The content hash of each row: the first 32 hex digits of the SHA-256 of its text."""
        return [hashlib.sha256(text.encode()).hexdigest()[:32] for text in self.texts]

    def __add__(self, other: "TextRows") -> "TextRows":
        return TextRows(self.texts + other.texts, torch.cat([self.labels, other.labels]))


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

    def fingerprint(self) -> str:
        """A hash of every text, label and class name: equal data, equal fingerprint, wherever it lies."""
        digest = hashlib.sha256(json.dumps([self.classes, self.focus]).encode())
        for rows in (self.train, self.valid, self.test, self.unlabelled):
            digest.update(f"{len(rows)}\n".encode())
            digest.update("".join(rows.keys()).encode())
            digest.update(rows.labels.numpy().tobytes())
        return digest.hexdigest()[:32]


def load_classification(recipe: DataRecipe) -> ClassificationData:
    """Read the data set that a recipe names.

    Raises:
        KdtrainError: a missing file or column, an unreadable line, or a label outside the classes, with its place.
    """
    if recipe.path is not None:
        data = _load_folder(Path(recipe.path), recipe)
    else:
        splits = {
            name: _load_file(getattr(recipe, name), recipe)
            for name in ("train", "valid", "test", "unlabelled")
        }
        splits["test"] = splits["test"] if recipe.test else splits["valid"]
        data = ClassificationData(str(recipe.train), recipe.classes, recipe.focus, **splits)
    for name in ("train", "valid", "test"):
        rows: TextRows = getattr(data, name)
        if not len(rows):
            raise KdtrainError(f"the {name} split of {data.name} has no rows")
        if name != "train" and bool((rows.labels == UNLABELLED).any()):
            raise KdtrainError(
                f"the {name} split of {data.name} has rows without a label; only training rows may"
            )
    return data


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each line's place ('file:line') and object.

    Raises:
        KdtrainError: no such file, or a line that is not a JSON object, with its number.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise KdtrainError(f"{place} is not a line of JSON: {error}") from None
                if not isinstance(row, dict):
                    raise KdtrainError(f"{place} must hold a JSON object, got {type(row).__name__}")
                yield place, row
    except OSError as error:
        raise KdtrainError(f"cannot read {path}: {error.strerror}") from None


def _load_folder(folder: Path, recipe: DataRecipe) -> ClassificationData:
    try:
        about = json.loads((folder / "dataset.json").read_text())
    except FileNotFoundError:
        raise KdtrainError(f"{folder} is no data set: it has no dataset.json") from None
    except (OSError, ValueError) as error:
        raise KdtrainError(f"{folder / 'dataset.json'} is not readable JSON: {error}") from None
    if about.get("task") != "classification":
        raise KdtrainError(
            f"{folder} holds the task {about.get('task')!r}; only 'classification' can be trained"
        )
    classes = tuple(about["classes"])
    columns = about.get("text", recipe.text), about.get("label", recipe.label)

    def read(name: str, labelled: bool) -> TextRows:
        path = folder / f"{name}.jsonl"
        return _rows(read_jsonl(path) if labelled or path.exists() else [], columns, classes, labelled)

    return ClassificationData(
        name=about.get("name", folder.name),
        classes=classes,
        focus=recipe.focus or about.get("focus"),
        train=read("train", True),
        valid=read("valid", True),
        test=read("test", True),
        unlabelled=read("unlabelled", False),
    )


def _load_file(name: str | None, recipe: DataRecipe) -> TextRows:
    if name is None:
        return TextRows([], torch.zeros(0, dtype=torch.int64))
    path = Path(name)
    if path.suffix not in FORMATS:
        raise KdtrainError(f"{path} must end in one of {', '.join(FORMATS)}")
    if not path.exists():
        raise KdtrainError(f"cannot read {path}: there is no such file")
    from datasets import (  # takes a second; a data set folder does without it
        disable_progress_bars,
        load_dataset,
    )
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    try:
        table = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        if path.suffix == ".jsonl":
            for _ in read_jsonl(path):  # names the line
                pass
        raise KdtrainError(f"{path} cannot be read as {FORMATS[path.suffix]}: {error.__cause__}") from None
    places = ((f"{path}, row {number}", dict(row)) for number, row in enumerate(table, start=1))
    return _rows(places, (recipe.text, recipe.label), recipe.classes, name != recipe.unlabelled)


def _rows(
    rows: Iterable[tuple[str, dict[str, Any]]],
    columns: tuple[str, str],
    classes: tuple[str, ...],
    labelled: bool,
) -> TextRows:
    text_column, label_column = columns
    numbers = {name: i for i, name in enumerate(classes)}
    texts, labels = [], []
    for place, row in rows:
        text = row.get(text_column)
        if not isinstance(text, str):
            raise KdtrainError(f"{place} has no text in column {text_column!r} (columns: {', '.join(row)})")
        label = row.get(label_column) if labelled else None
        if labelled and label is None:
            raise KdtrainError(f"{place} has no label in column {label_column!r} (columns: {', '.join(row)})")
        label = UNLABELLED if label is None else numbers.get(label, label)
        if label != UNLABELLED and not (type(label) is int and 0 <= label < len(classes)):
            raise KdtrainError(
                f"{place} has label {label!r}; the {len(classes)} classes are numbered 0 to {len(classes) - 1} "
                f"({', '.join(classes[:3])}, ...)"
            )
        texts.append(text)
        labels.append(label)
    return TextRows(texts, torch.tensor(labels, dtype=torch.int64))
