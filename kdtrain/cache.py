"""Teacher outputs on disk: computed once, keyed by the content of the row, and refused when they are another teacher's.

A cache is a folder: `manifest.json` says whose outputs these are, `shard-00000.safetensors`, ... hold them. A shard is
written whole or not at all and carries its own checksum, so a killed build goes on where it stopped. Shards are
memory-mapped when read.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kdtrain.data.tokens import TokenRows, token_budget_batches, tokenize
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, write_json, write_tensors
from kdtrain.models import Teacher, sentence_states, shape_of
from kdtrain.progress import progress, say

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_ROWS = 2048

MEANINGS = {
    "format": "its file format",
    "teacher_weights": "the weights of the teacher",
    "tokenizer": "the tokenizer of the teacher",
    "max_length": "the tokens the teacher sees of a row (teacher.max_length)",
    "focus": "the focus marker of the data",
    "dtype": "how features are stored (teacher.dtype)",
    "classes": "the number of classes",
}
"""What each checked field of the manifest is, in the words of the sentence that refuses it."""


@dataclass(frozen=True)
class Identity:
    """Whose outputs a cache holds. Two identities may differ in `layers` only, and only by more being stored."""

    teacher_weights: str
    tokenizer: str
    max_length: int
    focus: str | None
    dtype: str
    classes: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, teacher: Teacher, *, focus: str | None, dtype: str, layers: tuple[int, ...]) -> "Identity":
        """The identity of what `teacher` would produce now."""
        available = shape_of(teacher.model.config).layers
        for layer in layers:
            if layer > available:
                raise KdtrainError(
                    f"teacher layer {layer} was asked for, but {teacher.path} has {available} layers"
                )
        return cls(
            teacher_weights=teacher.weights_hash(),
            tokenizer=teacher.tokenizer_hash(),
            max_length=teacher.max_length,
            focus=focus,
            dtype=dtype,
            classes=teacher.classes,
            layers=tuple(sorted(set(layers))),
        )

    def manifest(self) -> dict[str, Any]:
        """As it stands in manifest.json."""
        return {"format": FORMAT, **vars(self), "layers": list(self.layers)}


class TeacherCache:
    """The stored outputs, found by row key."""

    def __init__(self, folder: Path, layers: tuple[int, ...]) -> None:
        self.folder = folder
        self.layers = layers
        self.shards: list[dict[str, Tensor]] = []
        self.places: dict[str, tuple[int, int]] = {}
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
    """Teacher outputs of the rows of one split, by row number."""

    def __init__(self, cache: TeacherCache, places: list[tuple[int, int]], columns: list[int]) -> None:
        self.cache, self.places, self.columns = cache, places, columns
        self.logits = torch.stack([cache.shards[shard]["logits"][i] for shard, i in places])
        """(rows, C) float32"""

    def states(self, rows: Tensor) -> Tensor:
        """(B, L, D_t) float32 of the given row numbers, read from the memory-mapped shards."""
        places = (self.places[row] for row in rows.tolist())
        return torch.stack(
            [self.cache.shards[shard]["states"][i][self.columns] for shard, i in places]
        ).float()


def open_cache(folder: Path, identity: Identity) -> TeacherCache | None:
    """The cache at `folder`, None when there is none yet.

    Raises:
        KdtrainError: it belongs to another teacher, tokenizer, length, ...; the sentence names the first difference.
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
    wanted = identity.manifest()
    for name, meaning in MEANINGS.items():
        if found.get(name) != wanted[name]:
            raise KdtrainError(
                f"the teacher cache {folder} is not of this teacher: {meaning} is {found.get(name)!r} there and "
                f"{wanted[name]!r} here; give another teacher.cache or delete that folder"
            )
    missing = sorted(set(identity.layers) - set(found["layers"]))
    if missing:
        raise KdtrainError(
            f"the teacher cache {folder} stores the layers {found['layers']} and this run needs {missing} too; "
            "set teacher.layers to all of them and give another teacher.cache, or delete that folder"
        )
    return TeacherCache(folder, tuple(found["layers"]))


def build_cache(
    folder: Path,
    teacher: Teacher,
    identity: Identity,
    texts: Sequence[str],
    keys: Sequence[str],
    *,
    batch_tokens: int,
    device: torch.device,
) -> TeacherCache:
    """Open the cache and compute the rows it lacks."""
    cache = open_cache(folder, identity)
    layers = cache.layers if cache is not None else identity.layers
    known = cache.places if cache is not None else {}
    todo = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if cache is None:
        write_json(folder / MANIFEST, {**identity.manifest(), "teacher": teacher.path, "rows": 0})
        cache = TeacherCache(folder, layers)
    if not todo:
        return cache
    width = shape_of(teacher.model.config).width
    bytes_per_row = (
        16 + 4 * identity.classes + len(layers) * width * (2 if identity.dtype == "float16" else 4)
    )
    need, free = len(todo) * bytes_per_row, shutil.disk_usage(folder).free
    parts = f"{identity.classes} logits" + (
        f" + {len(layers)} x {width} features in {identity.dtype}" if layers else ""
    )
    say(f"teacher cache: {len(todo)} rows x ({parts}) = {human_bytes(need)} in {folder}")
    if need > free:
        raise KdtrainError(
            f"the teacher cache needs {human_bytes(need)} in {folder}, which has {human_bytes(free)} free; "
            "give another teacher.cache or store fewer teacher.layers"
        )
    todo_keys = list(todo)
    rows = tokenize(list(todo.values()), teacher.tokenizer, teacher.max_length, identity.focus)
    nn.Module.to(teacher.model, device)
    waiting: list[tuple[list[str], Tensor, Tensor | None]] = []
    with progress(len(todo), "teacher", unit="rows") as bar:
        batches = token_budget_batches(rows.lengths, batch_tokens)
        for number, index in enumerate(batches):
            logits, states = teacher_outputs(teacher, rows, index, layers, device)
            waiting.append(([todo_keys[i] for i in index.tolist()], logits, states))
            if sum(len(part[0]) for part in waiting) >= SHARD_ROWS or number == len(batches) - 1:
                cache.add(_write_shard(folder, waiting, identity.dtype))
                waiting = []
            bar.update(len(index))
    write_json(
        folder / MANIFEST,
        {**identity.manifest(), "layers": list(layers), "teacher": teacher.path, "rows": len(cache)},
    )
    return cache


@torch.inference_mode()
def teacher_outputs(
    teacher: Teacher, rows: TokenRows, index: Tensor, layers: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, C) and, with `layers`, sentence states (B, L, D_t), both float32 on the host."""
    input_ids, mask = rows.batch(index)
    output = teacher.model(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), output_hidden_states=bool(layers)
    )
    logits = output.logits.float().cpu()
    if not bool(logits.isfinite().all()):
        raise KdtrainError(
            f"the teacher {teacher.path} gives logits that are not finite; its weights are damaged"
        )
    return logits, sentence_states(output, layers).float().cpu() if layers else None


def verify_cache(
    cache: TeacherCache,
    teacher: Teacher,
    identity: Identity,
    texts: Sequence[str],
    keys: Sequence[str],
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
        if stored != _checksum(shard):
            raise KdtrainError(
                f"{path} has changed since it was written; delete this one file and it is computed again"
            )
    known = [i for i, key in enumerate(keys) if key in cache.places]
    chosen = sorted(random.Random(seed).sample(known, min(count, len(known))))
    rows = tokenize([texts[i] for i in chosen], teacher.tokenizer, teacher.max_length, identity.focus)
    stored_rows = cache.rows([keys[i] for i in chosen], cache.layers)
    nn.Module.to(teacher.model, device)
    for row in range(len(chosen)):
        index = torch.tensor([row])
        logits, states = teacher_outputs(teacher, rows, index, cache.layers, device)
        pairs = [("logits", stored_rows.logits[index], logits, 1e-3)]
        if states is not None:
            pairs.append(("states", stored_rows.states(index), states, 1e-2))
        for name, stored_values, now, tolerance in pairs:
            worst = float((stored_values - now).abs().max())
            if worst > tolerance * (1 + float(now.abs().max())):
                raise KdtrainError(
                    f"row {keys[chosen[row]]} of {cache.folder}: the stored {name} differ from the recomputed ones by "
                    f"{worst:.3g}; delete the folder and build it again"
                )
    return len(chosen)


def _write_shard(folder: Path, parts: list[tuple[list[str], Tensor, Tensor | None]], dtype: str) -> Path:
    keys = b"".join(bytes.fromhex(key) for part in parts for key in part[0])
    shard = {
        "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 16),
        "logits": torch.cat([logits for _, logits, _ in parts]),
    }
    states = [part for _, _, part in parts if part is not None]
    if states:
        shard["states"] = torch.cat(states).to(getattr(torch, dtype))
        if not bool(shard["states"].isfinite().all()):
            raise KdtrainError("a teacher feature is too large for float16; set teacher.dtype to float32")
    taken = [int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.safetensors")]
    path = folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
    write_tensors(path, shard, {"sha256": _checksum(shard)})
    return path


def _checksum(shard: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(shard.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
