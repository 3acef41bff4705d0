"""Top-k entries of a teacher that ran elsewhere, in a folder that any program can write (docs/code-lm.md).

The folder is a teacher store (see `kdtrain.teacher_cache.store`) with the teacher's tokenizer beside it, as
`save_pretrained` writes it, and a manifest of four fields:

    {"format": "kdtrain teacher store 3", "teacher": a name, "vocabulary": V_t, "top_k": K}

The files may have any name. In place of `keys` and `checksums` they may hold the documents themselves, end to end:

    lengths (documents,) int64
    input_ids (tokens,) int32 or int64
    logprobs (tokens, K) float32, float16 or bfloat16
    indices (tokens, K) int32 or int64

Entry i of a document is about what follows its token i: log-probabilities of the whole distribution at temperature 1. An
entry that was left out has the log-probability -inf and any unused id. Documents longer than a row are cut as the
rows are. Files that `datasets` writes (any-name.arrow) hold the same without `lengths`, one document in a row.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.errors import KdtrainError
from kdtrain.models.language_student import SAMPLE_CODE
from kdtrain.models.loading import load_tokenizer
from kdtrain.models.vocabulary import match_vocabularies
from kdtrain.teacher_cache.shard import Shard, map_file, token_keys
from kdtrain.teacher_cache.store import FORMAT, MANIFEST, Element, Store, StoreSpec

REMEDY = "make or copy it again"
DTYPES = {
    "lengths": (torch.int64,),
    "input_ids": (torch.int64, torch.int32),
    "logprobs": (torch.float32, torch.float16, torch.bfloat16),
    "indices": (torch.int64, torch.int32),
}
DEPTHS = {"input_ids": 1, "logprobs": 2, "indices": 2}
"""Lists within lists of an Arrow column."""
SAMPLED_ROWS = 64
# Nats. An untrained teacher, or code that repeats itself, does not reach it by chance.
LEAST_ADVANTAGE = 0.2
CHECKED_TOKENS = 1 << 16


class ExternalShard(Shard):
    """Documents of one file, or of one record batch of an Arrow file, cut into rows; values are checked when first read."""

    remedy = REMEDY
    shared: int
    """ids have to be below"""
    first_token = 0
    """of the file, of this record batch"""

    def check(self, row: int, name: str) -> None:
        """Refuse a row that has changed, or values that are not log-probabilities of different tokens of the student."""
        if self.checksums is not None:
            super().check(row, name)
        if name == "indices":
            self.check_values(int(self.starts[row]), int(self.sizes[row]))

    def check_values(self, first: int, size: int) -> None:
        """The same for a range of tokens."""
        logprobs, ids = (self.tensors[name][first : first + size] for name in ("logprobs", "indices"))
        ordered = ids.sort(-1).values
        wrong = {
            "log-probabilities that are NaN, or above 0": ~(logprobs <= 1e-3).all(-1),
            "probabilities whose sum is above 1": logprobs.double().exp().sum(-1) > 1.01,
            "no log-probability above -inf": logprobs.isneginf().all(-1),
            f"ids outside of 0 to {self.shared - 1}, the tokens that the student shares": (
                (ids < 0) | (ids >= self.shared)
            ).any(-1),
            "one id twice": (ordered[:, 1:] == ordered[:, :-1]).any(-1),
        }
        for words, rows in wrong.items():
            if bool(rows.any()):
                token = self.first_token + first + int(rows.nonzero()[0])
                raise KdtrainError(f"{self.path}: the entry of token {token} holds {words}")


class ExternalStore(Store):
    """All documents of such a folder, in rows of at most `max_length` tokens."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        kept = Element("float32", (manifest["top_k"],))
        tensors = {"logprobs": kept, "indices": kept._replace(dtype="int32")}
        super().__init__(folder, StoreSpec(teacher=manifest["teacher"], teacher_weights="", tensors=tensors))
        self.manifest, self.tokenizer = manifest, tokenizer
        self.words = ""
        self.shards = [
            shard
            for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.arrow")])
            for shard in read_file(path, manifest["top_k"], max_length)
        ]
        self.limit_ids(manifest["vocabulary"])
        if not self.shards:
            raise KdtrainError(f"teacher.path: {folder} holds no .safetensors or .arrow file with documents")

    @classmethod
    def read(cls, folder: Path, max_length: int) -> "ExternalStore":
        """Read the manifest, map the files and find their rows.

        Raises:
            KdtrainError: no such folder, or files that do not hold what they should.
        """
        return cls(folder, read_manifest(folder), load_tokenizer(str(folder), "teacher.path"), max_length)

    @classmethod
    def open_for(
        cls, folder: Path, max_length: int, tokenizer: PreTrainedTokenizerBase, student_size: int, tail: str
    ) -> "ExternalStore":
        """The store for a student with this tokenizer and this many rows in its head.

        Args:
            tail: what stands for the tokens without an entry (teacher.tail).

        Raises:
            KdtrainError: what `read` and `describe` refuse; another tokenizer; a bucket for no tokens.
        """
        store = cls.read(folder, max_length)
        size = store.manifest["vocabulary"]
        match = match_vocabularies(tokenizer, store.tokenizer, student_size, size, SAMPLE_CODE)
        if tail == "bucket" and store.manifest["top_k"] >= match.shared:
            raise KdtrainError(
                f"{folder} keeps all {match.shared} tokens and leaves nothing for teacher.tail bucket; set it to renormalize"
            )
        store.limit_ids(match.shared)
        store.words = store.describe()
        return store

    def limit_ids(self, shared: int) -> None:
        """Ids 0 to shared - 1 are tokens of the student."""
        for shard in self.shards:
            assert isinstance(shard, ExternalShard)
            shard.shared = shared

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, names and sizes of the files, keys, and the entries of a sample."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"{shard.path.name} {shard.path.stat().st_size}\n".encode() + shard.keys.tobytes())
        for shard, row in self.sample():
            for name in ("logprobs", "indices"):
                digest.update(shard.part(row, name).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def sample(self) -> list[tuple[Shard, int]]:
        """Some rows out of all files."""
        ends = np.cumsum([len(shard.keys) for shard in self.shards])
        numbers = range(0, int(ends[-1]), max(1, int(ends[-1]) // SAMPLED_ROWS))
        places = [(i, int(np.searchsorted(ends, i, side="right"))) for i in numbers[:SAMPLED_ROWS]]
        return [
            (self.shards[shard], i - int(ends[shard]) + len(self.shards[shard].keys)) for i, shard in places
        ]

    def verify(self) -> None:
        """Check everything that is checked when it is first read."""
        for shard in self.shards:
            assert isinstance(shard, ExternalShard)
            tokens = int(shard.sizes.sum())
            for first in range(0, tokens, CHECKED_TOKENS):
                shard.check_values(first, min(CHECKED_TOKENS, tokens - first))
            if shard.checksums is not None:
                for row in range(len(shard.keys)):
                    for name in shard.tensors:
                        shard.check(row, name)

    def describe(self) -> str:
        """Size and covered probability of a sample, in one line.

        Raises:
            KdtrainError: the entries of a token predict that token, or the one after the next, better than the next.
        """
        covered, losses, count = 0.0, torch.zeros(3, dtype=torch.float64), 0
        for shard, row in self.sample():
            logprobs, ids = (shard.read(row, name)[:-2] for name in ("logprobs", "indices"))
            kept, logprobs = ~logprobs.isneginf(), logprobs.double()
            covered += float(logprobs.exp().sum())
            count += len(ids)
            if "input_ids" not in shard.tensors:  # written by kdtrain cache, which counts right
                continue
            tokens = shard.part(row, "input_ids")
            # A token without an entry is less likely than those with one.
            least = logprobs.masked_fill(~kept, 0.0).amin(-1) - 1.0
            for distance in range(3):
                meant = (tokens[distance : distance + len(ids), None] == ids) & kept
                found = torch.where(meant, logprobs, 0.0).sum(-1)
                losses[distance] -= torch.where(meant.any(-1), found, least).sum()
        at, following, after = (losses / max(count, 1)).tolist()
        if following > min(at, after) + LEAST_ADVANTAGE:
            raise KdtrainError(
                f"the entries of {self.folder} are misaligned: entry i scores token i (loss {at:.2f}) or token i + 2 (loss "
                f"{after:.2f}) better than token i + 1 (loss {following:.2f}), which it has to be about"
            )
        tokens = sum(int(shard.sizes.sum()) for shard in self.shards)
        rows = sum(len(shard.keys) for shard in self.shards)
        return (
            f"teacher shards: {tokens} tokens in {rows} segments, top {self.manifest['top_k']} entries of {self.manifest['teacher']}, "
            f"which hold {covered / max(count, 1):.2%} of the probability"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of such a folder, checked."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise KdtrainError(
            f"teacher.path: there is no {path}; with teacher.signal shards it has to name a folder of shards"
        ) from None
    except (OSError, ValueError) as error:
        raise KdtrainError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        given = found.get("format") if isinstance(found, dict) else found
        raise KdtrainError(f"{path} must name the format {FORMAT!r}, got {given!r}")
    for name in ("vocabulary", "top_k"):
        if not isinstance(found.get(name), int) or found[name] < 1:
            raise KdtrainError(f"{path}: {name} must be a whole number above 0, got {found.get(name)!r}")
    return {"teacher": "an unnamed teacher", **found}


def read_file(path: Path, top_k: int, max_length: int) -> Iterator[ExternalShard]:
    """The rows of one file, mapped."""
    first = 0
    for tensors in map_arrow(path) if path.suffix == ".arrow" else [map_file(path, REMEDY)]:
        if "keys" in tensors:
            yield ExternalShard.of(path, tensors)
            continue
        check_documents(path, tensors, top_k)
        lengths = tensors.pop("lengths").numpy()
        ends = lengths.cumsum()
        # Every document in cuts of max_length tokens, the last one shorter.
        cuts = -(-lengths // max_length)
        number = np.arange(cuts.sum()) - np.repeat(cuts.cumsum() - cuts, cuts)
        starts = np.repeat(ends - lengths, cuts) + number * max_length
        sizes = np.minimum(np.repeat(ends, cuts) - starts, max_length)
        keys = token_keys(tensors["input_ids"], starts, sizes)
        shard = ExternalShard(path, keys, torch.from_numpy(sizes), tensors, None)
        shard.first_token, first = first, first + int(ends[-1])
        yield shard


def check_documents(path: Path, tensors: dict[str, Tensor], top_k: int) -> None:
    """Refuse tensors that are missing, of another dtype, or that do not fit together."""
    for name, dtypes in DTYPES.items():
        if name not in tensors:
            raise KdtrainError(f"{path} has no {name} (it has {', '.join(sorted(tensors))})")
        if tensors[name].dtype not in dtypes:
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise KdtrainError(f"{path}: {name} must be {words}, got {tensors[name].dtype}")
    lengths, tokens = tensors["lengths"], int(tensors["lengths"].sum())
    if len(lengths) == 0 or int(lengths.min()) < 1:
        raise KdtrainError(f"{path}: lengths must hold a number above 0 for every document")
    shapes = {
        "lengths": (len(lengths),),
        "input_ids": (tokens,),
        "logprobs": (tokens, top_k),
        "indices": (tokens, top_k),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise KdtrainError(
                f"{path}: {name} must have shape {shape} for documents of {tokens} tokens and top_k {top_k}, got "
                f"{tuple(tensors[name].shape)}"
            )


def map_arrow(path: Path) -> Iterator[dict[str, Tensor]]:
    """The documents of each record batch of a file, end to end; the tensors are the memory-mapped file.

    Columns that the file lacks are missing, others are left out.

    Raises:
        KdtrainError: a damaged file, columns that hold something else, rows whose parts have different lengths.
    """
    import pyarrow as pa
    from datasets import Dataset

    try:
        with open(path, "rb") as file:
            random_access = file.read(6) == b"ARROW1"
        if random_access:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        else:
            table = cast(pa.Table, Dataset.from_file(str(path)).with_format("arrow")[:])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise KdtrainError(f"{path} is damaged ({error}); {REMEDY}") from None
    for batch in table.to_batches():
        tensors: dict[str, Tensor] = {}
        for name in (name for name in DEPTHS if name in batch.schema.names):
            values, sizes = batch.column(name), []
            while hasattr(values, "value_lengths") and not values.null_count:
                sizes.append(torch.from_dlpack(values.value_lengths().cast(pa.int64())))
                values = values.flatten()
            number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
            if len(sizes) != DEPTHS[name] or values.null_count or not number:
                words = "lists of numbers" if DEPTHS[name] == 1 else "lists of lists of numbers"
                raise KdtrainError(
                    f"{path}: {name} must be {words} without nulls, got {batch.schema.field(name).type}"
                )
            if not torch.equal(tensors.setdefault("lengths", sizes[0]), sizes[0]):
                raise KdtrainError(f"{path}: the lists of a row must have as many entries as it has tokens")
            tensors[name] = torch.from_dlpack(values)
            if DEPTHS[name] == 2:
                least, most = int(sizes[1].min()), int(sizes[1].max())
                if least != most:
                    raise KdtrainError(
                        f"{path}: {name} must hold equally many entries for every token, got {least} to {most}"
                    )
                tensors[name] = tensors[name].view(len(sizes[1]), -1)
        yield tensors
