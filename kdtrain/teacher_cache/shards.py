"""What teacher caches have in common: a folder with `manifest.json`, which says whose outputs these are, and shards.

A shard is a safetensors file that is written whole or not at all and carries its own checksum, so a killed build goes
on where it stopped; it is memory-mapped when read.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, write_tensors

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a cache's manifest, None where there is no cache yet."""
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


def check_manifest(
    folder: Path, found: dict[str, Any], wanted: dict[str, Any], meanings: dict[str, str]
) -> None:
    """Refuse a cache of another teacher.

    Args:
        meanings: the fields to compare, each with its words for the sentence.

    Raises:
        KdtrainError: names the first field that differs.
    """
    for name, meaning in meanings.items():
        if found.get(name) != wanted[name]:
            raise KdtrainError(
                f"the teacher cache {folder} is not of this teacher: {meaning} is {found.get(name)!r} there and "
                f"{wanted[name]!r} here; give another teacher.cache or delete that folder"
            )


def shard_paths(folder: Path) -> list[Path]:
    """All shards, in the order in which they were written."""
    return sorted(folder.glob("shard-*.safetensors"))


def map_shard(path: Path, remedy: str = "delete this one file and it is computed again") -> dict[str, Tensor]:
    """The tensors of one shard, memory-mapped; `remedy` ends the sentence that refuses a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise KdtrainError(f"{path} is damaged ({error}); {remedy}") from None


def write_shard(folder: Path, keys: list[str], tensors: dict[str, Tensor]) -> Path:
    """Write one more shard of rows with these keys (32 hexadecimal digits each)."""
    packed = bytearray(b"".join(bytes.fromhex(key) for key in keys))
    shard = {"keys": torch.frombuffer(packed, dtype=torch.uint8).view(-1, 16), **tensors}
    taken = [int(path.stem.removeprefix("shard-")) for path in shard_paths(folder)]
    path = folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
    write_tensors(path, shard, {"sha256": checksum(shard)})
    return path


def verify_checksums(folder: Path) -> None:
    """Refuse a shard whose bytes changed since it was written."""
    for path in shard_paths(folder):
        with safe_open(path, framework="pt") as file:
            stored = file.metadata()["sha256"]
        if stored != checksum(map_shard(path)):
            raise KdtrainError(
                f"{path} has changed since it was written; delete this one file and it is computed again"
            )


def stored_sample(places: Mapping[str, Any], keys: Sequence[str], count: int, seed: int) -> list[int]:
    """The numbers of `count` random rows, in order, out of those whose key is stored (all of these if they are fewer)."""
    known = [i for i, key in enumerate(keys) if key in places]
    return sorted(random.Random(seed).sample(known, min(count, len(known))))


def check_agreement(folder: Path, key: str, name: str, stored: Tensor, now: Tensor, tolerance: float) -> None:
    """Refuse a stored row that the teacher now answers otherwise, by more than `tolerance` of its largest value."""
    worst = float((stored - now).abs().max())
    if not worst <= tolerance * (1 + float(now.abs().max())):
        raise KdtrainError(
            f"row {key} of {folder}: the stored {name} differ from the recomputed ones by {worst:.3g}; delete the folder and "
            "build it again"
        )


def check_room(folder: Path, need: int, smaller: str) -> None:
    """Refuse to fill the disk; `smaller` names what else makes the cache small."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise KdtrainError(
            f"the teacher cache needs {human_bytes(need)} in {folder}, which has {human_bytes(free)} free; give another "
            f"teacher.cache or {smaller}"
        )


def checksum(shard: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a shard's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(shard.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
