"""Rows of text with labels, or pairs of texts, as they come out of JSONL, CSV and Parquet files."""

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.files import json_object
from kdtrain.outputs import IGNORED

FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextRows:
    """One split as it stands on disk."""

    texts: list[str]
    labels: Tensor
    """(rows,) int64, `IGNORED` where there is none"""
    seconds: list[str] | None = None
    """the second text of each row, for tasks over pairs"""

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self) -> list[str]:
        """The content hash of each row: the first 32 hex digits of the SHA-256 of its text, or of both texts."""
        if self.seconds is None:
            return [_hash(text) for text in self.texts]
        known = {text: _hash(text) for text in {*self.texts, *self.seconds}}
        return [_hash(known[a] + known[b]) for a, b in zip(self.texts, self.seconds, strict=True)]

    def digest(self) -> str:
        """A hash of all texts in their order: equal digests, equal rows, wherever they lie."""
        return _hash("".join(self.keys()))

    def all_texts(self) -> list[str]:
        """Every distinct text, in order of appearance."""
        return list(dict.fromkeys([*self.texts, *(self.seconds or [])]))

    def select(self, index: list[int]) -> "TextRows":
        """The rows of the given numbers, in that order."""
        seconds = None if self.seconds is None else [self.seconds[i] for i in index]
        return TextRows([self.texts[i] for i in index], self.labels[index], seconds)

    def __add__(self, other: "TextRows") -> "TextRows":
        if not len(other):
            return self
        seconds = None if self.seconds is None else self.seconds + (other.seconds or [])
        return TextRows(self.texts + other.texts, torch.cat([self.labels, other.labels]), seconds)


@dataclass(frozen=True)
class Columns:
    """Where the parts of a row stand."""

    text: str
    label: str
    second: str | None = None
    table: Mapping[str, str] | None = None
    """texts by id, where the text columns hold ids"""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each line's place ('file:line') and object; blank lines are passed over.

    Raises:
        KdtrainError: no such file, or a line that is not a JSON object, with its number.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                if line.strip():
                    yield place, json_object(place, line)
    except OSError as error:
        raise KdtrainError(f"cannot read {path}: {error.strerror}") from None


def read_file(path: Path, columns: Columns, classes: tuple[str, ...], labelled: bool) -> TextRows:
    """Read a split out of a JSONL, CSV or Parquet file, by its suffix."""
    if path.suffix not in FORMATS:
        raise KdtrainError(f"{path} must end in one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise KdtrainError(f"cannot read {path}: there is no such file")
    if path.suffix == ".jsonl":  # datasets would turn texts that look like dates into dates
        return read_rows(read_jsonl(path), columns, classes, labelled)
    from datasets import (  # takes a second; a data set folder does without it
        disable_progress_bars,
        load_dataset,
    )
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    try:
        table = load_dataset(FORMATS[path.suffix], data_files=glob.escape(str(path)), split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise KdtrainError(f"{path} cannot be read as {FORMATS[path.suffix]}: {reason}") from None
    places = (
        (f"{path}, row {number}", _whole_label(dict(row), columns.label))
        for number, row in enumerate(table, start=1)
    )
    return read_rows(places, columns, classes, labelled)


def _whole_label(row: dict[str, Any], column: str) -> dict[str, Any]:
    """A row of a table: one label that is missing makes floats of the others, and it is the one to be named."""
    label = row.get(column)
    return {**row, column: int(label)} if isinstance(label, float) and label.is_integer() else row


def read_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], columns: Columns, classes: tuple[str, ...], labelled: bool
) -> TextRows:
    """Check every row and number its label.

    Raises:
        KdtrainError: a row without a text or label, an id that the table lacks, a label outside the classes.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    texts: list[str] = []
    seconds: list[str] = []
    labels: list[int] = []
    for place, row in rows:
        texts.append(_text(place, row, columns.text, columns.table))
        if columns.second is not None:
            seconds.append(_text(place, row, columns.second, columns.table))
        label = row.get(columns.label) if labelled else None
        if labelled and label is None:
            raise KdtrainError(
                f"{place} has no label in column {columns.label!r} (columns: {', '.join(row)})"
            )
        label = IGNORED if label is None else _number(place, label, numbers)
        if label != IGNORED and not (type(label) is int and 0 <= label < len(classes)):
            raise KdtrainError(
                f"{place} has label {label!r}; the {len(classes)} classes are numbered 0 to {len(classes) - 1} "
                f"({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
            )
        labels.append(label)
    return TextRows(
        texts, torch.tensor(labels, dtype=torch.int64), seconds if columns.second is not None else None
    )


def _number(place: str, label: Any, numbers: dict[str, int]) -> Any:
    """The class that a label means; what means none comes back as it is."""
    if isinstance(label, str):
        return numbers.get(label, label)
    if type(label) is int and numbers.get(str(label), label) != label:
        raise KdtrainError(
            f"{place} has label {label}, and {label} is also the name of class {numbers[str(label)]}: number the rows "
            "0, 1, ... and give the classes names that are no numbers"
        )
    return label


def _text(place: str, row: dict[str, Any], column: str, table: Mapping[str, str] | None) -> str:
    value = row.get(column)
    if table is not None:
        if str(value) not in table:
            raise KdtrainError(
                f"{place} names the id {value!r} in column {column!r}, which the code table lacks"
            )
        return table[str(value)]
    if not isinstance(value, str) or not value.strip():
        raise KdtrainError(f"{place} has no text in column {column!r} (columns: {', '.join(row)})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise KdtrainError(
            f"{place} holds half of a surrogate pair in column {column!r} at character {error.start}; take it out"
        ) from None
    return value
