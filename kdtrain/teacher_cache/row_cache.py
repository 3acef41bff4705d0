"""Teacher outputs on disk: computed once, keyed by the content of the row, and refused when they are another teacher's.

A shard of the folder (see `kdtrain/teacher_cache/shards.py`) holds

    keys (R, 16) uint8, logits (R, C) float32, and with layers either
    states (R, P, L, D): the first token of each of the P texts of a row, or
    lengths (R, P) int64 and states (tokens, L, D): every token, texts one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.models.loading import shape_of
from kdtrain.models.teachers import Teacher
from kdtrain.teacher_cache.shards import MANIFEST, check_manifest, map_shard, read_manifest, shard_paths

FORMAT = 2

MEANINGS = {
    "format": "its file format",
    "teacher_weights": "the weights of the teacher",
    "tokenizer": "the tokenizer of the teacher",
    "outputs": "the order of its outputs and its inserted tokens (teacher.class_order, teacher.insert)",
    "max_length": "the tokens the teacher sees of a row (teacher.max_length)",
    "focus": "the focus marker of the data",
    "dtype": "how features are stored (teacher.dtype)",
    "classes": "the number of classes",
}
"""What each checked field of the manifest is, in the words of the sentence that refuses it."""


@dataclass(frozen=True)
class Identity:
    """Whose outputs a cache holds. Of two that fit, the stored one may have more layers, and sequences for first tokens."""

    teacher_weights: str
    tokenizer: str
    outputs: str
    max_length: int
    focus: str | None
    dtype: str
    classes: int
    layers: tuple[int, ...]
    sequences: bool

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        *,
        focus: str | None,
        dtype: str,
        layers: tuple[int, ...],
        sequences: bool = False,
    ) -> "Identity":
        """The identity of what `teacher` would produce now."""
        shape = shape_of(teacher.model.config)
        for layer in layers:
            if layer > shape.layers:
                raise KdtrainError(
                    f"teacher layer {layer} was asked for, but {teacher.path} has {shape.layers} layers"
                )
        if sequences and not shape.embeddings:
            raise KdtrainError(
                f"whole sequences can be stored of a Transformer teacher only, and {teacher.path} is a BiGRU"
            )
        return cls(
            teacher_weights=teacher.weights_hash(),
            tokenizer=teacher.tokenizer_hash(),
            outputs=teacher.outputs_hash(),
            max_length=teacher.max_length,
            focus=focus,
            dtype=dtype,
            classes=teacher.classes,
            layers=tuple(sorted(set(layers))),
            sequences=sequences,
        )

    def manifest(self) -> dict[str, Any]:
        """As it stands in manifest.json."""
        return {"format": FORMAT, **vars(self), "layers": list(self.layers)}


class TeacherCache:
    """The stored outputs, found by row key."""

    def __init__(self, folder: Path, layers: tuple[int, ...], sequences: bool = False) -> None:
        self.folder = folder
        self.layers = layers
        self.sequences = sequences
        self.shards: list[dict[str, Tensor]] = []
        self.places: dict[str, tuple[int, int]] = {}
        for path in shard_paths(folder):
            self.add(path)

    def add(self, path: Path) -> None:
        """Map one more shard."""
        shard = map_shard(path)
        if "lengths" in shard:
            ends = shard["lengths"].flatten().cumsum(0).reshape(shard["lengths"].shape)
            shard["starts"] = ends - shard["lengths"]
        for i, key in enumerate(shard["keys"].numpy()):
            self.places[key.tobytes().hex()] = (len(self.shards), i)
        self.shards.append(shard)

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, keys: Sequence[str], layers: tuple[int, ...] = ()) -> "TeacherRows":
        """The outputs for these rows in this order; `layers` must be among the stored ones."""
        return TeacherRows(
            self, [self.places[key] for key in keys], [self.layers.index(layer) for layer in layers]
        )


class TeacherRows:
    """Teacher outputs of the rows of one split, by row number. P texts a row: 1, or 2 for pairs."""

    def __init__(self, cache: TeacherCache, places: list[tuple[int, int]], columns: list[int]) -> None:
        self.cache, self.places, self.columns = cache, places, columns
        self.logits = torch.stack([cache.shards[shard]["logits"][i] for shard, i in places])
        """(rows, C) float32"""

    def states(self, rows: Tensor) -> Tensor:
        """(B * P, L, D_t) float32, the first tokens of the given row numbers."""
        found = []
        for number, i in (self.places[row] for row in rows.tolist()):
            shard = self.cache.shards[number]
            found.append(shard["states"][shard["starts"][i] if self.cache.sequences else i][:, self.columns])
        return torch.cat(found).float()

    def sequences(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B * P, L, N, D_t) float32, every token, and the mask (B * P, N) bool of what is no padding."""
        found = []
        for number, i in (self.places[row] for row in rows.tolist()):
            shard = self.cache.shards[number]
            for start, length in zip(shard["starts"][i].tolist(), shard["lengths"][i].tolist(), strict=True):
                found.append(shard["states"][start : start + length][:, self.columns].float())
        padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True).transpose(1, 2)
        lengths = torch.tensor([len(one) for one in found])
        return padded, torch.arange(padded.shape[2]) < lengths[:, None]


def open_cache(folder: Path, identity: Identity) -> TeacherCache | None:
    """The cache at `folder`, None when there is none yet.

    Raises:
        KdtrainError: it belongs to another teacher, tokenizer, length, ...; the sentence names the first difference.
    """
    found = read_manifest(folder)
    if found is None:
        if shard_paths(folder):
            raise KdtrainError(
                f"the teacher cache {folder} has no {MANIFEST}, so nothing says whose outputs these are; delete that folder"
            )
        return None
    for name in ("layers", "sequences"):
        if name not in found:
            raise KdtrainError(
                f"{folder / MANIFEST} is damaged, it has no {name}; delete the folder {folder} to build it again"
            )
    check_manifest(folder, found, identity.manifest(), MEANINGS)
    missing = sorted(set(identity.layers) - set(found["layers"]))
    if missing:
        raise KdtrainError(
            f"the teacher cache {folder} stores the layers {found['layers']} and this run needs {missing} too; "
            "set teacher.layers to all of them and give another teacher.cache, or delete that folder"
        )
    if identity.sequences and not found["sequences"]:
        raise KdtrainError(
            f"the teacher cache {folder} stores first tokens only and this run needs whole sequences; "
            "set teacher.sequences to true and give another teacher.cache, or delete that folder"
        )
    return TeacherCache(folder, tuple(found["layers"]), found["sequences"])
