"""What a teacher language model says of every row, on disk: computed once, keyed by the row's content.

There is a folder (see `kdtrain/teacher_cache/shards.py`) for each kind of signal. A shard holds

    keys (R, 16) uint8: SHA-256 over tokens and positions of a row, its first 16 bytes
    lengths (R,) int64: tokens of each row; the tokens of all rows stand end to end in
    hidden (tokens, D_t): what enters the teacher's head, from which its distribution is exact, or
    logprobs (tokens, K) float32 and indices (tokens, K) int32: the K likeliest tokens, at temperature 1, or
    cross (tokens, D_s), bias and entropy (tokens,) float32: what forward KL needs for one frozen head of a student
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdtrain.errors import KdtrainError
from kdtrain.models.heads import head_of
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.recipe import LanguageRecipe, LanguageTeacherRecipe
from kdtrain.teacher_cache.shards import MANIFEST, check_manifest, map_shard, read_manifest, shard_paths

FORMAT = 2

Kind = Literal["hidden", "topk", "cross_term"]
TENSORS: dict[Kind, tuple[str, ...]] = {
    "hidden": ("hidden",),
    "topk": ("logprobs", "indices"),
    "cross_term": ("cross", "bias", "entropy"),
}
"""What a shard of each kind holds of every token."""

MEANINGS = {
    "format": "its file format",
    "kind": "what is stored (teacher.signal)",
    "teacher_weights": "the weights of the teacher",
    "precision": "the precision of the teacher (teacher.precision)",
    "dtype": "how hidden states are stored (teacher.dtype)",
    "top_k": "the tokens kept of each distribution (teacher.top_k)",
    "vocabulary": "the tokens that student and teacher share",
    "student_head": "the frozen head of the student (student.path, training.precision)",
    "temperature": "the temperature that the cross-term is for (method.temperature)",
}
"""What each checked field of the manifest is, in the words of the sentence that refuses it."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def row_keys(rows: PackedRows) -> list[str]:
    """What a row is found by: 16 bytes of the SHA-256 of its tokens and positions, as hex."""
    keys = []
    for start, length in zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True):
        part = slice(start, start + length)
        content = rows.tokens[part].numpy().tobytes() + rows.positions[part].numpy().tobytes()
        keys.append(hashlib.sha256(content).hexdigest()[:32])
    return keys


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """A student's head as the products of a step see it, and the temperature of its loss."""

    weight: Tensor
    """(V_s, D_s)"""
    bias: Tensor | None
    temperature: float

    @classmethod
    def of(cls, student: PreTrainedModel, recipe: LanguageRecipe) -> "FrozenHead":
        """The student's head in the precision of training.

        Raises:
            KdtrainError: it is trained, or caps its logits.
        """
        head = head_of(student)
        if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
            raise KdtrainError(
                "teacher.signal cross_term is stored for one head of the student, which training would change; set "
                "student.frozen_head: true (or student.lora_rank), or teacher.signal: hidden"
            )
        if head.softcap is not None:
            raise KdtrainError(
                f"teacher.signal cross_term needs logits that are linear in the hidden states, but the student caps its own "
                f"at {head.softcap}; set teacher.signal: hidden"
            )
        dtype = DTYPES[recipe.training.precision]
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        return cls(head.weight.detach().to(dtype), bias, recipe.method.temperature)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over its numbers."""
        digest = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Signal:
    """What is stored of each token, and whose it is."""

    kind: Kind
    width: int
    """D_t of hidden states, K of kept tokens, D_s of a cross-term"""
    dtype: Literal["float32", "bfloat16"]
    precision: str
    teacher_weights: str
    vocabulary: int | None = None
    """of kept tokens and cross-terms: the distribution is over ids 0 to vocabulary - 1, which the student has too"""
    frozen: FrozenHead | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        teacher: LanguageTeacher,
        recipe: LanguageTeacherRecipe,
        *,
        shared: int | None = None,
        frozen: FrozenHead | None = None,
    ) -> "Signal":
        """What the teacher section of a recipe asks for.

        Args:
            shared: ids 0 to shared - 1 mean the same token to student and teacher; None when all do.
            frozen: the student's head, for a cross-term.
        """
        shared = teacher.head.weight.shape[0] if shared is None else shared
        width = teacher.head.weight.shape[1]
        if frozen is not None:
            width = frozen.weight.shape[1]
        elif kind == "topk":
            width = recipe.top_k
            if width > shared:
                raise KdtrainError(
                    f"teacher.top_k is {width}, but the teacher has {shared} tokens only that the student knows"
                )
            if width == shared and recipe.tail == "bucket":
                raise KdtrainError(
                    f"teacher.top_k keeps all {shared} tokens and leaves nothing for teacher.tail bucket; set it to renormalize"
                )
        return cls(
            kind,
            width,
            recipe.dtype if kind == "hidden" else "float32",
            recipe.precision,
            teacher.weights_hash,
            None if kind == "hidden" else shared,
            frozen,
        )

    @classmethod
    def for_run(
        cls,
        kind: Kind,
        teacher: LanguageTeacher,
        student: PreTrainedModel,
        shared: int,
        recipe: LanguageRecipe,
    ) -> "Signal":
        """What a run with this student stores of the teacher, with whom it shares ids 0 to shared - 1."""
        rows = head_of(student).weight.shape[0]
        if kind == "cross_term" and rows > shared:
            raise KdtrainError(
                f"the student's head has {rows} rows, of which the teacher shares {shared}; a cross-term would compare over "
                "all of them and not, as the teacher itself would, over the shared ones; set teacher.signal: hidden"
            )
        frozen = FrozenHead.of(student, recipe) if kind == "cross_term" else None
        return cls.of(kind, teacher, recipe.teacher, shared=shared, frozen=frozen)

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        if self.kind == "topk":
            return 8 * self.width
        if self.kind == "cross_term":
            return 4 * (self.width + 2)
        return self.width * (2 if self.dtype == "bfloat16" else 4)

    def words(self) -> str:
        """For people."""
        return {
            "topk": f"{self.width} tokens with their log-probabilities",
            "cross_term": f"{self.width} numbers for the student's frozen head, its bias and an entropy",
            "hidden": f"{self.width} hidden values in {self.dtype}",
        }[self.kind]

    def manifest(self) -> dict[str, Any]:
        """As it stands in manifest.json."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "teacher_weights": self.teacher_weights,
            "precision": self.precision,
            "dtype": self.dtype,
            "top_k": self.width if self.kind == "topk" else None,
            "vocabulary": self.vocabulary,
            "student_head": None if self.frozen is None else self.frozen.fingerprint,
            "temperature": None if self.frozen is None else self.frozen.temperature,
        }


class LanguageCache:
    """Stored outputs, found by row key."""

    def __init__(self, folder: Path, signal: Signal) -> None:
        self.folder, self.signal = folder, signal
        self.shards: list[dict[str, Tensor]] = []
        self.places: dict[str, tuple[int, int, int]] = {}
        for path in shard_paths(folder):
            self.add(path)

    def add(self, path: Path) -> None:
        """Map one more shard."""
        shard, first = map_shard(path), 0
        for key, length in zip(shard["keys"].numpy(), shard["lengths"].tolist(), strict=True):
            self.places[key.tobytes().hex()] = (len(self.shards), first, length)
            first += length
        self.shards.append(shard)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, name: str, keys: Sequence[str], width: int) -> Tensor:
        """(B, width, ...) of tensor `name` for these rows, zeros behind their ends."""
        parts = []
        for key in keys:
            shard, first, length = self.places[key]
            parts.append(self.shards[shard][name][first : first + length])
        out = parts[0].new_zeros((len(keys), width, *parts[0].shape[1:]))
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out

    def covered(self) -> float:
        """Mean probability of the kept tokens, over all stored tokens."""
        total = sum(float(shard["logprobs"].double().exp().sum()) for shard in self.shards)
        return total / sum(len(shard["logprobs"]) for shard in self.shards)


def open_language_cache(folder: Path, signal: Signal) -> LanguageCache | None:
    """The cache at `folder`, None when there is none yet.

    Raises:
        KdtrainError: it belongs to another teacher, or stores something else; the sentence names the first difference. Or
            nothing says whose it is.
    """
    found = read_manifest(folder)
    if found is None:
        if shard_paths(folder):
            raise KdtrainError(
                f"the teacher cache {folder} has no {MANIFEST}, so nothing says whose outputs these are; delete that folder"
            )
        return None
    check_manifest(folder, found, signal.manifest(), MEANINGS)
    return LanguageCache(folder, signal)
