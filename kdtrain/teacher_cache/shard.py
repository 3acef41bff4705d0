"""One file of a teacher store: rows of different lengths, end to end, found by key and compared with their checksums."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtrain.errors import KdtrainError

Keys = np.ndarray
"""(R,) S16: the first 16 bytes of a SHA-256 over the content of each row."""


def keys_of(hexadecimal: Sequence[str]) -> Keys:
    """Keys from 32 hexadecimal digits each."""
    return np.frombuffer(bytes.fromhex("".join(hexadecimal)), "S16")


def token_keys(tokens: Tensor, starts: np.ndarray, sizes: np.ndarray) -> Keys:
    """Keys of segments of documents: `tokens[starts[i] : starts[i] + sizes[i]]`, as int32, is row i."""
    content = tokens.numpy().astype("<i4", copy=False)
    hashes = (
        hashlib.sha256(content[first : first + size].tobytes()).digest()[:16]
        for first, size in zip(starts.tolist(), sizes.tolist(), strict=True)
    )
    return np.frombuffer(b"".join(hashes), "S16")


class Ragged(NamedTuple):
    """Rows of different lengths, end to end."""

    values: Tensor
    """(sum of lengths, ...)"""
    lengths: Tensor
    """(R,) int64, or (R, P)"""


class Shard:
    """Rows of one mapped file."""

    remedy = "delete this one file and it is computed again"

    def __init__(
        self, path: Path, keys: Keys, lengths: Tensor, tensors: dict[str, Tensor], checksums: Tensor | None
    ) -> None:
        self.path, self.keys, self.lengths, self.checksums = path, keys, lengths, checksums
        self.tensors = dict(sorted(tensors.items()))
        self.sizes = lengths.reshape(len(keys), -1).sum(1).numpy()
        self.starts = self.sizes.cumsum() - self.sizes
        self.checked = np.zeros((len(keys), len(tensors)), dtype=bool)

    @classmethod
    def of(cls, path: Path, tensors: dict[str, Tensor]) -> Self:
        """From all tensors of a file.

        Raises:
            KdtrainError: they do not fit together.
        """
        tensors = dict(tensors)
        try:
            keys = tensors.pop("keys").numpy().view("S16").reshape(-1)
            lengths, checksums = tensors.pop("lengths"), tensors.pop("checksums")
            shard = cls(path, keys, lengths, tensors, checksums)
            if not tensors or {len(tensor) for tensor in tensors.values()} != {int(shard.sizes.sum())}:
                raise ValueError("its tensors do not have as many elements as its lengths say")
            if checksums.shape != shard.checked.shape or int(shard.sizes.min()) < 0:
                raise ValueError("it does not have one checksum for every row of every tensor")
        except (KeyError, ValueError, RuntimeError) as error:
            raise KdtrainError(f"{path} is damaged ({error}); {cls.remedy}") from None
        return shard

    def read(self, row: int, name: str) -> Tensor:
        """(elements, ...) of one row.

        Raises:
            KdtrainError: its bytes have changed since they were written.
        """
        column = list(self.tensors).index(name)
        if not self.checked[row, column]:
            self.check(row, name)
            self.checked[row, column] = True
        return self.part(row, name)

    def part(self, row: int, name: str) -> Tensor:
        """(elements, ...) of one row, unchecked."""
        first = self.starts[row]
        return self.tensors[name][first : first + self.sizes[row]]

    def check(self, row: int, name: str) -> None:
        """Compare one row with its checksum."""
        key = self.keys[row : row + 1].tobytes()
        assert self.checksums is not None
        stored = int(self.checksums[row, list(self.tensors).index(name)])
        if checksum(key, self.lengths[row], name, self.part(row, name)) != stored:
            raise KdtrainError(
                f"{self.path} has changed since it was written ({name} of row {key.hex()}); {self.remedy}"
            )


class StoredRows:
    """What is stored of given rows, by row number."""

    def __init__(
        self, shards: Sequence[Shard], places: dict[str, tuple[np.ndarray, np.ndarray]], count: int
    ) -> None:
        self.shards, self.places, self.count = shards, places, count

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Tensor | Sequence[int], names: Sequence[str] | None = None) -> dict[str, Ragged]:
        """The tensors of these row numbers, by default all that were asked for."""
        numbers, out = np.asarray(rows), {}
        for name in names or self.places:
            shards, indices = (place[numbers].tolist() for place in self.places[name])
            found = [(self.shards[shard], index) for shard, index in zip(shards, indices, strict=True)]
            values = torch.cat([shard.read(index, name) for shard, index in found])
            out[name] = Ragged(values, torch.stack([shard.lengths[index] for shard, index in found]))
        return out


def checksum(key: bytes, lengths: Tensor, name: str, values: Tensor) -> int:
    """XXH3 (64 bits, as int64) over the key, lengths, name, dtype, shape and bytes of one row of one tensor."""
    about = f"{key.hex()} {lengths.tolist()} {name} {values.dtype} {tuple(values.shape)}\n"
    digest = xxhash.xxh3_64(about.encode())
    if values.numel():
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big", signed=True)


def map_file(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped; `remedy` ends the error that refuses a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise KdtrainError(f"{path} is damaged ({error}); {remedy}") from None
