"""The teacher store: what a teacher computed, kept on disk, found by the content of the text that it was computed from.

A folder of `manifest.json` (whose outputs these are) and any number of shards, safetensors files that are memory-mapped:

    keys (R, 16) uint8: a hash of the content of every row: a text, two texts, or a segment of a document
    lengths (R,) int64: how many elements each row has in the tensors of this file; (R, P) for rows of P texts
    NAME (sum of lengths, ...): one or more tensors, rows end to end
    checksums (R, tensors) int64: of every row in every tensor, in the order of their names

| tensor | elements of a row | |
|---|---|---|
| `logits` | 1 | class logits, (C,) |
| `states.L` | 1 for each text | sentence state of layer L, (D,) |
| `tokens.L` | 1 for each token | state of layer L, (D,) |
| `hidden` | 1 for each token | what enters the head of a language model, (D,) |
| `logprobs`, `indices` | 1 for each token | top-k entries at temperature 1, (K,) |
| `cross`, `bias`, `entropy` | 1 for each token | what forward KL needs for one frozen head of a student, (D,), () and () |

Files of one folder may hold different tensors: a store that lacks a layer gets further files, the old ones stay as they are.
A file is written whole or not at all, so what a killed build had written is used. A row is compared with its checksum
when it is first read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.files import write_json, write_tensors
from kdtrain.teacher_cache.shard import Keys, Ragged, Shard, StoredRows, checksum, map_file

FORMAT = "kdtrain teacher store 3"
MANIFEST = "manifest.json"
MEANINGS = {
    "format": "the file format",
    "teacher_weights": "the hash of the weights of the teacher",
    "tokenizer": "the hash of the tokenizer of the teacher",
    "outputs": "the order of the outputs and the inserted tokens of the teacher (teacher.class_order, teacher.insert)",
    "max_length": "the number of tokens the teacher sees of a row (teacher.max_length)",
    "focus": "the focus marker of the data",
    "classes": "the number of classes",
    "precision": "the precision of the teacher (teacher.precision)",
    "dtype": "the dtype of stored states (teacher.dtype)",
    "top_k": "the number of top-k entries of each distribution (teacher.top_k)",
    "vocabulary": "the number of tokens that student and teacher share",
    "student_head": "the frozen head of the student (student.path, training.precision)",
    "temperature": "the temperature of the cross-term (method.temperature)",
}
"""Each compared field of the manifest in the words of the error that refuses another value."""


class Element(NamedTuple):
    """What a tensor holds of one text, or of one token."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """On disk."""
        return getattr(torch, self.dtype).itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Whose outputs a run needs, and which. A field that says nothing about a task stays None."""

    teacher: str
    """path or name, for people; the only field that is not compared"""
    teacher_weights: str
    tensors: Mapping[str, Element]
    """the stored ones may be more"""
    tokenizer: str | None = None
    outputs: str | None = None
    max_length: int | None = None
    focus: str | None = None
    classes: int | None = None
    precision: str = "fp32"
    dtype: str | None = None
    top_k: int | None = None
    vocabulary: int | None = None
    student_head: str | None = None
    temperature: float | None = None

    def manifest(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """As written to manifest.json: all fields, and these tensors besides those of the spec."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["tensors"] = {**tensors, **self.tensors}
        return json.loads(json.dumps({"format": FORMAT, **content}))

    def check(self, folder: Path, found: dict[str, Any]) -> None:
        """Refuse the store at `folder` with this manifest when it is not of this spec; names the first difference."""
        wanted = self.manifest({})
        for name, meaning in MEANINGS.items():
            if found.get(name) != wanted[name]:
                raise KdtrainError(
                    f"the teacher cache {folder} does not fit this recipe: {meaning} is {found.get(name)!r} there and "
                    f"{wanted[name]!r} here; set teacher.cache to another folder or delete that one"
                )
        if not isinstance(found.get("tensors"), dict):
            raise KdtrainError(
                f"{folder / MANIFEST} is damaged, it has no tensors; delete the folder {folder} to build it again"
            )
        for name, element in wanted["tensors"].items():
            if found["tensors"].get(name, element) != element:
                raise KdtrainError(
                    f"the teacher cache {folder} does not fit this recipe: {name} is {found['tensors'][name]} there and {element} here; "
                    "set teacher.cache to another folder or delete that one"
                )


class Store:
    """The stored outputs of one teacher. Open one with `Store.open`; `kdtrain.teacher_cache.build` fills it."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        self.folder, self.spec = folder, spec
        self.shards: list[Shard] = []
        self._index: dict[tuple[int, ...], tuple[Keys, np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path, spec: StoreSpec) -> "Store":
        """The store at `folder`, an empty one where there is none yet; nothing is written.

        Raises:
            KdtrainError: it is of another teacher, tokenizer, length, ... (the first difference is named), or damaged.
        """
        store = cls(folder, spec)
        store.refresh()
        return store

    def refresh(self) -> None:
        """Map what was written since."""
        found, paths = read_manifest(self.folder), shard_paths(self.folder)
        if found is not None:
            self.spec.check(self.folder, found)
        elif paths:
            raise KdtrainError(
                f"the teacher cache {self.folder} has no {MANIFEST}, so nothing says whose outputs these are; delete that folder"
            )
        known = {shard.path for shard in self.shards}
        self.shards += [Shard.of(path, map_file(path, Shard.remedy)) for path in paths if path not in known]
        self._index.clear()

    def __len__(self) -> int:
        """Rows of which anything is stored."""
        return len(np.unique(np.concatenate([shard.keys for shard in self.shards]))) if self.shards else 0

    def find(self, name: str, keys: Keys) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every key: the number of the shard with its `name`, the row there, and whether there is one, (R,) each."""
        holders = tuple(i for i, shard in enumerate(self.shards) if name in shard.tensors)
        if holders not in self._index:
            sizes = [len(self.shards[i].keys) for i in holders]
            stored = np.concatenate([np.zeros(0, "S16"), *(self.shards[i].keys for i in holders)])
            order = np.argsort(stored, kind="stable")
            rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in sizes)])
            self._index[holders] = (
                stored[order],
                np.repeat(np.array(holders, dtype=np.int64), sizes)[order],
                rows[order],
            )
        stored, shards, rows = self._index[holders]
        if not len(stored):
            nowhere = np.zeros(len(keys), dtype=np.int64)
            return nowhere, nowhere, nowhere.astype(bool)
        place = np.searchsorted(stored, keys).clip(max=len(stored) - 1)
        return shards[place], rows[place], stored[place] == keys

    def missing(self, keys: Keys) -> list[tuple[tuple[str, ...], np.ndarray]]:
        """Row numbers to compute, each distinct key once, grouped by the tensors that they lack."""
        if not len(keys):
            return []
        _, distinct = np.unique(keys, return_index=True)
        lacks = np.stack([~self.find(name, keys[distinct])[2] for name in self.spec.tensors], axis=1)
        sets, group = np.unique(lacks, axis=0, return_inverse=True)
        names = np.array(list(self.spec.tensors))
        return [
            (tuple(names[chosen].tolist()), np.sort(distinct[group.reshape(-1) == i]))
            for i, chosen in enumerate(sets)
            if chosen.any()
        ]

    def rows(self, keys: Keys, names: Sequence[str] | None = None) -> StoredRows:
        """The rows with these keys, in this order; `names` are by default all tensors of the spec.

        Raises:
            KdtrainError: a row that is not stored.
        """
        places = {}
        for name in names or self.spec.tensors:
            shards, rows, found = self.find(name, keys)
            if not found.all():
                raise KdtrainError(
                    f"the teacher cache {self.folder} lacks {name} of {(~found).sum()} of {len(keys)} rows"
                )
            places[name] = (shards, rows)
        return StoredRows(self.shards, places, len(keys))

    def write_manifest(self) -> None:
        """Write or widen manifest.json where it does not name all tensors of the spec."""
        found = read_manifest(self.folder) or {"tensors": {}}
        if set(self.spec.tensors) - set(found["tensors"]):
            write_json(self.folder / MANIFEST, self.spec.manifest(found["tensors"]))

    def write(self, keys: Keys, outputs: Mapping[str, Ragged]) -> None:
        """Write what was computed of these rows; tensors with equal lengths share a file.

        Several processes may write at a time.
        """
        groups: list[tuple[Tensor, dict[str, Tensor]]] = []
        for name, (values, lengths) in sorted(outputs.items()):
            group = next((group for known, group in groups if torch.equal(known, lengths)), None)
            if group is None:
                groups.append((lengths, group := {}))
            group[name] = values
        for lengths, group in groups:
            sizes = lengths.reshape(len(keys), -1).sum(1).tolist()
            sums = [
                [
                    checksum(keys[i : i + 1].tobytes(), lengths[i], name, part)
                    for i, part in enumerate(values.split(sizes))
                ]
                for name, values in group.items()
            ]
            tensors = {
                "keys": torch.from_numpy(keys.view(np.uint8).reshape(-1, 16).copy()),
                "lengths": lengths,
                "checksums": torch.tensor(sums, dtype=torch.int64).T,
                **group,
            }
            name = xxhash.xxh3_64_hexdigest(" ".join(group).encode() + keys.tobytes())
            write_tensors(self.folder / f"shard-{name}.safetensors", tensors)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a store's manifest, None where there is no store yet."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise KdtrainError(
            f"{path} is not readable JSON ({error}); delete the folder {folder} to build it again"
        ) from None
    return found


def shard_paths(folder: Path) -> list[Path]:
    """All shards."""
    return sorted(folder.glob("shard-*.safetensors"))
