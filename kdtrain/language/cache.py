"""What a teacher language model says of every row, on disk: computed once, keyed by the row's content.

A cache is a folder for each kind of signal. `manifest.json` says whose outputs these are, `shard-00000.safetensors`, ...
hold them; a shard is written whole or not at all, carries its own checksum, and is memory-mapped when read. It holds

    keys (R, 16) uint8: SHA-256 over tokens and positions of a row, its first 16 bytes
    lengths (R,) int64: tokens of each row; the tokens of all rows stand end to end in
    hidden (tokens, D_t): what enters the teacher's head, from which its distribution is exact, or
    logprobs (tokens, K) float32 and indices (tokens, K) int32: the K likeliest tokens, at temperature 1
"""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kdtrain.cache_build import checksum
from kdtrain.data.tokens import token_budget_batches
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, write_json, write_tensors
from kdtrain.language.heads import Head
from kdtrain.language.packing import PackedRows
from kdtrain.language.recipe import LanguageTeacherRecipe
from kdtrain.language.teacher import LanguageTeacher
from kdtrain.progress import progress, say

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_TOKENS = 1 << 18
CHUNK_TOKENS = 512

Kind = Literal["hidden", "topk"]

MEANINGS = {
    "format": "its file format",
    "teacher_weights": "the weights of the teacher",
    "precision": "the precision of the teacher (teacher.precision)",
    "dtype": "how hidden states are stored (teacher.dtype)",
    "top_k": "the tokens kept of each distribution (teacher.top_k)",
}
"""What each checked field of the manifest is, in the words of the sentence that refuses it."""


def row_keys(rows: PackedRows) -> list[str]:
    """What a row is found by: 16 bytes of the SHA-256 of its tokens and positions, as hex."""
    keys = []
    for start, length in zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True):
        part = slice(start, start + length)
        content = rows.tokens[part].numpy().tobytes() + rows.positions[part].numpy().tobytes()
        keys.append(hashlib.sha256(content).hexdigest()[:32])
    return keys


@dataclass(frozen=True)
class Signal:
    """What is stored of each token, and whose it is."""

    kind: Kind
    width: int
    """D_t of hidden states, K of kept tokens"""
    dtype: Literal["float32", "bfloat16"]
    precision: str
    teacher_weights: str

    @classmethod
    def of(cls, kind: Kind, teacher: LanguageTeacher, recipe: LanguageTeacherRecipe) -> "Signal":
        """What `recipe` asks for."""
        vocabulary, width = teacher.head.weight.shape
        if kind == "topk" and recipe.top_k > vocabulary:
            raise KdtrainError(
                f"teacher.top_k is {recipe.top_k}, but the teacher knows {vocabulary} tokens only"
            )
        if kind == "topk" and recipe.top_k == vocabulary and recipe.tail == "bucket":
            raise KdtrainError(
                f"teacher.top_k keeps all {vocabulary} tokens and leaves nothing for teacher.tail bucket; set it to renormalize"
            )
        return cls(
            kind,
            width if kind == "hidden" else recipe.top_k,
            recipe.dtype if kind == "hidden" else "float32",
            recipe.precision,
            teacher.weights_hash,
        )

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        if self.kind == "topk":
            return 8 * self.width
        return self.width * (2 if self.dtype == "bfloat16" else 4)

    def words(self) -> str:
        """For people."""
        if self.kind == "topk":
            return f"{self.width} tokens with their log-probabilities"
        return f"{self.width} hidden values in {self.dtype}"

    def manifest(self) -> dict[str, Any]:
        """As it stands in manifest.json."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "teacher_weights": self.teacher_weights,
            "precision": self.precision,
            "dtype": self.dtype,
            "top_k": self.width if self.kind == "topk" else None,
        }


class LanguageCache:
    """Stored outputs, found by row key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[dict[str, Tensor]] = []
        self.places: dict[str, tuple[int, int, int]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            self.add(path)

    def add(self, path: Path) -> None:
        """Map one more shard."""
        try:
            with safe_open(path, framework="pt") as file:
                shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise KdtrainError(
                f"{path} is damaged ({error}); delete this one file and it is computed again"
            ) from None
        lengths = shard["lengths"].tolist()
        first = 0
        for key, length in zip(shard["keys"].numpy(), lengths, strict=True):
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
        KdtrainError: it belongs to another teacher, or stores something else; the sentence names the first difference.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise KdtrainError(
            f"{path} is not readable JSON ({error}); delete the folder {folder} to build it again"
        ) from None
    wanted = signal.manifest()
    for name, meaning in MEANINGS.items():
        if found.get(name) != wanted[name]:
            raise KdtrainError(
                f"the teacher cache {folder} is not of this teacher: {meaning} is {found.get(name)!r} there and "
                f"{wanted[name]!r} here; give another teacher.cache or delete that folder"
            )
    return LanguageCache(folder)


def build_language_cache(
    folder: Path,
    teacher: LanguageTeacher,
    signal: Signal,
    rows: PackedRows,
    *,
    batch_tokens: int,
    device: torch.device,
) -> LanguageCache:
    """Open the cache and compute the rows it lacks; the cost is said before anything is computed."""
    cache = open_language_cache(folder, signal)
    if cache is None:
        write_json(folder / MANIFEST, {**signal.manifest(), "teacher": teacher.path})
        cache = LanguageCache(folder)
    keys = row_keys(rows)
    todo = [i for i in {key: i for i, key in enumerate(keys)}.values() if keys[i] not in cache.places]
    if not todo:
        return cache
    tokens = int(rows.lengths[todo].sum())
    need, free = tokens * signal.bytes_per_token, shutil.disk_usage(folder).free
    say(
        f"teacher cache: {tokens} tokens x {signal.bytes_per_token} bytes ({signal.words()}) = {human_bytes(need)} in {folder}"
    )
    if need > free:
        raise KdtrainError(
            f"the teacher cache needs {human_bytes(need)} in {folder}, which has {human_bytes(free)} free; give another "
            "teacher.cache, a smaller teacher.top_k, or teacher.signal: online"
        )
    nn.Module.to(teacher.model, device)
    waiting: list[tuple[str, dict[str, Tensor]]] = []
    with progress(tokens, "teacher", unit="tokens") as bar:
        lengths = rows.lengths[todo]
        batches = token_budget_batches(lengths, batch_tokens)
        for number, index in enumerate(batches):
            index = torch.tensor(todo)[index]
            outputs = teacher_signal(teacher, signal, rows, index, device)
            for row, i in enumerate(index.tolist()):
                part = {name: value[row, : int(rows.lengths[i])] for name, value in outputs.items()}
                waiting.append((keys[i], part))
            stored = sum(len(next(iter(part.values()))) for _, part in waiting)
            if stored >= SHARD_TOKENS or number == len(batches) - 1:
                cache.add(_write_shard(folder, waiting))
                waiting = []
            bar.update(int(rows.lengths[index].sum()))
    if signal.kind == "topk":
        covered = cache.covered()
        write_json(
            folder / MANIFEST, {**signal.manifest(), "teacher": teacher.path, "covered_probability": covered}
        )
        say(f"teacher cache: the {signal.width} kept tokens hold {covered:.2%} of the probability")
    return cache


@torch.inference_mode()
def teacher_signal(
    teacher: LanguageTeacher, signal: Signal, rows: PackedRows, index: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """The stored tensors of these rows, each (B, N, ...), on the host."""
    hidden, _ = teacher.hidden(rows.batch(index, device))
    if not bool(hidden.isfinite().all()):
        raise KdtrainError(
            f"the teacher {teacher.path} gives values that are not finite; its weights are damaged"
        )
    if signal.kind == "hidden":
        return {"hidden": hidden.to(getattr(torch, signal.dtype)).cpu()}
    head = teacher.head
    wide = Head(
        head.weight.float(), None if head.bias is None else head.bias.float(), head.softcap, head.scale
    )
    flat = hidden.flatten(0, 1).float()
    kept = [wide.logits(part).log_softmax(-1).topk(signal.width, dim=-1) for part in flat.split(CHUNK_TOKENS)]
    shape = (*hidden.shape[:2], signal.width)
    return {
        "logprobs": torch.cat([part.values for part in kept]).view(shape).cpu(),
        "indices": torch.cat([part.indices for part in kept]).view(shape).int().cpu(),
    }


def verify_language_cache(
    cache: LanguageCache,
    teacher: LanguageTeacher,
    signal: Signal,
    rows: PackedRows,
    *,
    count: int,
    seed: int,
    device: torch.device,
) -> int:
    """Check the checksum of every shard and recompute `count` random rows; give the number of rows recomputed.

    Raises:
        KdtrainError: a shard whose bytes changed, or a row that the teacher now answers otherwise.
    """
    for path in sorted(cache.folder.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored, shard = file.metadata()["sha256"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stored != checksum(shard):
            raise KdtrainError(
                f"{path} has changed since it was written; delete this one file and it is computed again"
            )
    keys = row_keys(rows)
    known = [i for i, key in enumerate(keys) if key in cache.places]
    chosen = sorted(random.Random(seed).sample(known, min(count, len(known))))
    nn.Module.to(teacher.model, device)
    name = "hidden" if signal.kind == "hidden" else "logprobs"
    for i in chosen:
        now = teacher_signal(teacher, signal, rows, torch.tensor([i]), device)[name][0].float()
        worst = float((cache.read(name, [keys[i]], len(now))[0].float() - now).abs().max())
        if worst > 2e-2 * (1 + float(now.abs().max())):
            raise KdtrainError(
                f"row {keys[i]} of {cache.folder}: the stored {name} differ from the recomputed ones by {worst:.3g}; delete "
                "the folder and build it again"
            )
    return len(chosen)


def _write_shard(folder: Path, parts: list[tuple[str, dict[str, Tensor]]]) -> Path:
    keys = b"".join(bytes.fromhex(key) for key, _ in parts)
    names = parts[0][1]
    shard = {
        "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 16),
        "lengths": torch.tensor([len(next(iter(part.values()))) for _, part in parts]),
        **{name: torch.cat([part[name] for _, part in parts]) for name in names},
    }
    taken = [int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.safetensors")]
    path = folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
    write_tensors(path, shard, {"sha256": checksum(shard)})
    return path
