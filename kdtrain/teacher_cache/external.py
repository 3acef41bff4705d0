"""Kept tokens of a teacher that ran elsewhere, in a folder that any program can write (docs/code-lm.md).

manifest.json              {"format": "kdtrain teacher shards 1", "teacher": a name, "vocabulary": V_t, "top_k": K}
tokenizer.json, ...        the teacher's tokenizer, as `save_pretrained` writes it
any-name.safetensors, ...  of documents that stand end to end:
    lengths (documents,) int64
    input_ids (tokens,) int32 or int64
    teacher_logprobs (tokens, K) float32, float16 or bfloat16
    teacher_token_ids (tokens, K) int32 or int64

Entry i of a document says what follows its token i: log-probabilities of the whole distribution at temperature 1. An
entry that was not kept has the log-probability -inf and any id that is free. Documents longer than a row are cut as
the rows are. Files of `datasets` (any-name.arrow, teacher_arrow.py) hold the same, a document a row.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.errors import KdtrainError
from kdtrain.models.language_student import SAMPLE_CODE
from kdtrain.models.loading import load_tokenizer
from kdtrain.models.vocabulary import match_vocabularies
from kdtrain.outputs import Batch
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.teacher_cache.shards import MANIFEST, map_shard
from kdtrain.teacher_cache.token_rows import kept_tokens

FORMAT = "kdtrain teacher shards 1"
REMEDY = "make or copy it again"
DTYPES = {
    "lengths": (torch.int64,),
    "input_ids": (torch.int64, torch.int32),
    "teacher_logprobs": (torch.float32, torch.float16, torch.bfloat16),
    "teacher_token_ids": (torch.int64, torch.int32),
}
SAMPLED_DOCUMENTS = 64
# Nats. An untrained teacher, or code that repeats itself, does not reach it by chance.
LEAST_ADVANTAGE = 0.2
CHECKED_TOKENS = 1 << 16

Place = tuple[int, int, int]
"""shard, first token, tokens"""


def piece_key(tokens: Tensor) -> bytes:
    """What a piece of a document is found by."""
    return hashlib.sha256(tokens.int().numpy().tobytes()).digest()[:16]


@dataclass(frozen=True)
class TeacherShards:
    """All documents of a folder, and where each piece of at most `max_length` tokens stands."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    paths: list[Path]
    """of the shards; an Arrow file may hold several"""
    firsts: list[int]
    """of the shards' tokens in their files"""
    shards: list[dict[str, Tensor]]
    places: dict[bytes, Place]
    shared: int
    """kept ids have to lie below"""
    words: str = ""
    """what was found, in one line"""

    @classmethod
    def open(cls, folder: Path, max_length: int) -> "TeacherShards":
        """Read the manifest, map the shards and find their documents.

        Raises:
            KdtrainError: no such folder, or files that do not hold what they should.
        """
        manifest = read_manifest(folder)
        tokenizer = load_tokenizer(str(folder), "teacher.path")
        paths, firsts, shards, places = [], [], [], {}
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.arrow")]):
            tokens = 0
            for shard in read_file(path):
                check_shard(path, shard, manifest)
                first = 0
                for length in shard["lengths"].tolist():
                    for start in range(first, first + length, max_length):
                        size = min(max_length, first + length - start)
                        key = piece_key(shard["input_ids"][start : start + size])
                        places[key] = (len(shards), start, size)
                    first += length
                paths.append(path)
                firsts.append(tokens)
                shards.append(shard)
                tokens += first
        if not shards:
            raise KdtrainError(f"teacher.path: {folder} holds no .safetensors or .arrow file with documents")
        return cls(folder, manifest, tokenizer, paths, firsts, shards, places, manifest["vocabulary"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, names, sizes and documents of the shards, and the entries of a sample of these."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        for path in self.paths:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for key in sorted(self.places):
            digest.update(key)
        for place in self.sample():
            for values in self.read(place):
                digest.update(values.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def read(self, place: Place) -> tuple[Tensor, Tensor]:
        """(n, K) log-probabilities and ids of one piece."""
        shard, first, length = place
        part = slice(first, first + length)
        return self.shards[shard]["teacher_logprobs"][part], self.shards[shard]["teacher_token_ids"][part]

    def sample(self) -> list[Place]:
        """Some pieces out of all files."""
        every = max(1, len(self.places) // SAMPLED_DOCUMENTS)
        return list(self.places.values())[::every][:SAMPLED_DOCUMENTS]

    def check_values(self, place: Place) -> None:
        """Refuse what are no log-probabilities of different tokens that the student knows."""
        logprobs, ids = self.read(place)
        ordered = ids.sort(-1).values
        wrong = {
            "log-probabilities that are NaN, or above 0": ~(logprobs <= 1e-3).all(-1),
            "probabilities whose sum is above 1": logprobs.double().exp().sum(-1) > 1.01,
            "no token that was kept": logprobs.isneginf().all(-1),
            f"ids outside of 0 to {self.shared - 1}, the tokens that the student shares": (
                (ids < 0) | (ids >= self.shared)
            ).any(-1),
            "one id twice": (ordered[:, 1:] == ordered[:, :-1]).any(-1),
        }
        for words, rows in wrong.items():
            if bool(rows.any()):
                token = self.firsts[place[0]] + place[1] + int(rows.nonzero()[0])
                raise KdtrainError(f"{self.paths[place[0]]}: the entry of token {token} holds {words}")

    def verify(self) -> None:
        """`check_values` of everything."""
        for number, shard in enumerate(self.shards):
            tokens = len(shard["input_ids"])
            for first in range(0, tokens, CHECKED_TOKENS):
                self.check_values((number, first, min(CHECKED_TOKENS, tokens - first)))

    def describe(self) -> str:
        """Size and covered probability of a sample, in one line.

        Raises:
            KdtrainError: the entries say better what stands at their token, or two behind it, than what follows.
        """
        covered, losses, count = 0.0, torch.zeros(3, dtype=torch.float64), 0
        for place in self.sample():
            self.check_values(place)
            logprobs, ids = (part[:-2] for part in self.read(place))
            kept, logprobs = ~logprobs.isneginf(), logprobs.double()
            tokens = self.shards[place[0]]["input_ids"][place[1] : place[1] + place[2]]
            covered += float(logprobs.exp().sum())
            count += len(ids)
            # A token that was not kept is less likely.
            least = logprobs.masked_fill(~kept, 0.0).amin(-1) - 1.0
            for distance in range(3):
                meant = (tokens[distance : distance + len(ids), None] == ids) & kept
                found = torch.where(meant, logprobs, 0.0).sum(-1)
                losses[distance] -= torch.where(meant.any(-1), found, least).sum()
        at, following, behind = (losses / max(count, 1)).tolist()
        if following > min(at, behind) + LEAST_ADVANTAGE:
            raise KdtrainError(
                f"the entries of {self.folder} fit another token than the next one (loss at the token itself {at:.2f}, at the "
                f"next {following:.2f}, at the one behind that {behind:.2f}); entry i has to say what follows token i"
            )
        tokens = sum(len(shard["input_ids"]) for shard in self.shards)
        return (
            f"teacher shards: {tokens} tokens in {len(self.places)} pieces, {self.manifest['top_k']} kept tokens of "
            f"{self.manifest['teacher']}, which hold {covered / max(count, 1):.2%} of the probability"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards, checked."""
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


def read_file(path: Path) -> Iterable[dict[str, Tensor]]:
    """The shards of one file, memory-mapped."""
    if path.suffix == ".safetensors":
        return [map_shard(path, REMEDY)]
    from kdtrain.teacher_cache.external_arrow import map_arrow

    return map_arrow(path, REMEDY)


def check_shard(path: Path, shard: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Refuse tensors that are missing, of another dtype, or that do not fit together."""
    for name, dtypes in DTYPES.items():
        if name not in shard:
            raise KdtrainError(f"{path} has no {name} (it has {', '.join(sorted(shard))})")
        if shard[name].dtype not in dtypes:
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise KdtrainError(f"{path}: {name} must be {words}, got {shard[name].dtype}")
    lengths, tokens = shard["lengths"], int(shard["lengths"].sum())
    shapes = {
        "lengths": (len(lengths),),
        "input_ids": (tokens,),
        "teacher_logprobs": (tokens, manifest["top_k"]),
        "teacher_token_ids": (tokens, manifest["top_k"]),
    }
    if len(lengths) == 0 or int(lengths.min()) < 1:
        raise KdtrainError(f"{path}: lengths must hold a number above 0 for every document")
    for name, shape in shapes.items():
        if tuple(shard[name].shape) != shape:
            raise KdtrainError(
                f"{path}: {name} must have shape {shape} for documents of {tokens} tokens and top_k {manifest['top_k']}, got "
                f"{tuple(shard[name].shape)}"
            )


@dataclass(frozen=True)
class ShardRows:
    """Packed rows whose batches carry the kept tokens of shards made elsewhere."""

    rows: PackedRows
    shards: TeacherShards
    places: list[list[Place]]
    unchecked: set[int]
    """rows whose values were not looked at yet"""

    @classmethod
    def of(cls, rows: PackedRows, shards: TeacherShards) -> "ShardRows":
        """Find every piece of the rows.

        Raises:
            KdtrainError: pieces that the shards do not hold.
        """
        places, missing, total = [], [], 0
        for start, length in zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True):
            part = slice(start, start + length)
            tokens, opens = rows.tokens[part], (rows.positions[part] == 0).nonzero().squeeze(1)
            pieces = tokens.tensor_split(opens[1:])
            found = [shards.places.get(piece_key(piece)) for piece in pieces]
            missing += [piece for piece, place in zip(pieces, found, strict=True) if place is None]
            places.append(found)
            total += len(pieces)
        if missing:
            words = shards.tokenizer.decode(missing[0][:24].tolist())
            raise KdtrainError(
                f"{len(missing)} of {total} pieces of the training documents are not in {shards.folder}, the first is "
                f"{len(missing[0])} tokens long and begins with {words!r}; the shards have to hold the same documents in the "
                "same tokens, each with what the tokenizer puts in front and the end-of-text token at its end"
            )
        return cls(rows, shards, places, set(range(len(places))))

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows, padded, with the stored top-k entries of the teacher."""
        batch = self.rows.batch(index, device)
        if not stored:
            return batch
        numbers, width = index.tolist(), batch.input_ids.shape[1]
        for row in self.unchecked & set(numbers):
            for place in self.places[row]:
                self.shards.check_values(place)
        self.unchecked.difference_update(numbers)
        parts = [[self.shards.read(place) for place in self.places[row]] for row in numbers]
        logprobs, ids = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.cat([pair[side] for pair in row]) for row in parts], batch_first=True
            )
            for side in (0, 1)
        )
        inside = torch.arange(width) < self.lengths[index][:, None]
        logprobs, indices = kept_tokens(logprobs, ids, inside, device)
        return replace(batch, stored={"teacher": {"logprobs": logprobs, "indices": indices}})

    def count(self, index: Tensor) -> int:
        """Labels that count in these rows."""
        return self.rows.count(index)


def open_shards(
    folder: str, max_length: int, tokenizer: PreTrainedTokenizerBase, student_size: int, tail: str
) -> TeacherShards:
    """The shards for a student with this tokenizer and this many rows in its head.

    Args:
        tail: what stands for the tokens that were not kept (teacher.tail).

    Raises:
        KdtrainError: what `TeacherShards.open` and `describe` refuse; another tokenizer; a bucket for no tokens.
    """
    shards = TeacherShards.open(Path(folder), max_length)
    size = shards.manifest["vocabulary"]
    match = match_vocabularies(tokenizer, shards.tokenizer, student_size, size, SAMPLE_CODE)
    if tail == "bucket" and shards.manifest["top_k"] >= match.shared:
        raise KdtrainError(
            f"{folder} keeps all {match.shared} tokens and leaves nothing for teacher.tail bucket; set it to renormalize"
        )
    shards = replace(shards, shared=match.shared)
    return replace(shards, words=shards.describe())
