"""Packed rows on disk, made once and mapped from there: for data that is larger than memory.

Documents stream through in windows of a few million tokens; what a window packs is appended to the files. A store is a
folder of its own, written whole or not at all: manifest.json, and for each split

    tokens.i32, labels.i32, positions.i32: what `PackedRows` holds, the rows end to end
    lengths.i64, counted.i64: one number a row
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.checksums import check_sealed, seal
from kdtrain.console import say
from kdtrain.errors import KdtrainError
from kdtrain.files import atomic_folder, human_bytes, write_json
from kdtrain.recipe import LanguageDataSection, differences
from kdtrain.tasks.code_lm.documents import WINDOW_TOKENS, Documents, document_windows, is_held_out, read_rows
from kdtrain.tasks.code_lm.packing import IGNORED, PackedRows, pack, shifted_labels

MANIFEST = "manifest.json"
FORMAT = 1
FILES = {"tokens": "i32", "labels": "i32", "positions": "i32", "lengths": "i64", "counted": "i64"}
TYPES = {"i32": np.dtype("<i4"), "i64": np.dtype("<i8")}


@dataclass(frozen=True)
class StoredRows:
    """Both splits, mapped, and the hash of all they hold."""

    train: PackedRows
    valid: PackedRows
    fingerprint: str


def stored_rows(
    recipe: LanguageDataSection,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    *,
    window_tokens: int = WINDOW_TOKENS,
) -> StoredRows:
    """The rows below `recipe.store`, made there first where there are none.

    Rows are those of `pack`, for each window on its own: a row is never filled from two windows.

    Raises:
        KdtrainError: the store was made of other data, by another tokenizer, or in other rows; a damaged store; and all that
            `load_documents` refuses.
    """
    assert recipe.store is not None
    folder = Path(recipe.store)
    wanted = description(recipe, tokenizer)
    if not folder.exists():
        say(f"data.store: tokenizing {recipe.train} into {folder}, once")
        write_store(folder, wanted, recipe, tokenizer, pad_id, window_tokens)
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise KdtrainError(
            f"data.store {folder} is not a store of rows: {MANIFEST} cannot be read; name another folder"
        ) from None
    different = differences(found["of"], wanted)
    if different:
        raise KdtrainError(
            f"data.store {folder} was made otherwise ({'; '.join(different[:3])}); name another folder, or delete that one and "
            "it is made again"
        )
    check_sealed(folder, f"delete {folder}, and the same command makes the store again")
    train, valid = (mapped(folder / split, pad_id) for split in ("train", "valid"))
    return StoredRows(train, valid, found["fingerprint"])


def description(recipe: LanguageDataSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the content of a store, as plain JSON: fields, tokenizer, and sizes and times of local files."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    said = [tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template]
    content = json.dumps([rules.to_str() if rules is not None else None, *said], sort_keys=True, default=str)
    fields = {name: value for name, value in recipe.plain().items() if name != "store"}
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "data": fields,
                "tokenizer": hashlib.sha256(content.encode()).hexdigest()[:32],
                "files": {
                    field: state_of_files(path, recipe)
                    for field, path in (("train", recipe.train), ("valid", recipe.valid))
                },
            }
        )
    )


def state_of_files(path: str | None, recipe: LanguageDataSection) -> str | None:
    """A hash of names, sizes and times of what lies at a local path; None for what is not local."""
    place = Path(path or "").expanduser()
    if path is None or not place.exists():
        return None
    files = [place] if place.is_file() else sorted(one for one in place.rglob("*") if one.is_file())
    if place.is_dir() and not (place / "dataset_info.json").exists():
        files = [one for one in files if one.suffix in recipe.suffixes]
    digest = hashlib.sha256()
    for one in files:
        status = one.stat()
        digest.update(f"{one} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def write_store(
    folder: Path,
    wanted: dict[str, Any],
    recipe: LanguageDataSection,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    window_tokens: int,
) -> None:
    """Let all documents through, and make the folder appear when they are done."""
    with atomic_folder(folder) as temporary:
        writers = {split: RowWriter(temporary / split) for split in ("train", "valid")}
        for split, documents in split_windows(recipe, tokenizer, window_tokens):
            if (shifted_labels(documents) != IGNORED).any():
                writers[split].add(pack(documents, recipe.max_length, pad_id, packing=recipe.packing))
        for split, writer in writers.items():
            if not writer.rows:
                raise KdtrainError(
                    f"{recipe.train} leaves no row with a label that counts to {'train on' if split == 'train' else 'measure on'}; "
                    "look at the columns that the data section names, at data.held_out, or name a data.valid"
                )
        write_json(
            temporary / MANIFEST,
            {
                "of": wanted,
                "splits": {
                    split: {"rows": writer.rows, "tokens": writer.tokens} for split, writer in writers.items()
                },
                "fingerprint": " ".join(writer.digest.hexdigest()[:32] for writer in writers.values()),
            },
        )
        seal(temporary)
    total = sum(writer.tokens for writer in writers.values())
    say(f"data.store: {total} tokens in {folder}, {human_bytes(12 * total)}")


def split_windows(
    recipe: LanguageDataSection, tokenizer: PreTrainedTokenizerBase, window_tokens: int
) -> Iterator[tuple[str, Documents]]:
    """Windows of documents, each for one split."""
    rows = read_rows(recipe.train, "data.train", recipe)
    for window in document_windows(rows, recipe, tokenizer, window_tokens):
        if recipe.valid is not None:
            yield "train", window
            continue
        held_out = is_held_out(window, recipe)
        for split, chosen in (("train", ~held_out), ("valid", held_out)):
            if chosen.any():
                yield split, window.select(chosen)
    if recipe.valid is not None:
        rows = read_rows(recipe.valid, "data.valid", recipe)
        for window in document_windows(rows, recipe, tokenizer, window_tokens):
            yield "valid", window


@dataclass
class RowWriter:
    """Appends packed rows to the files of one split."""

    folder: Path
    rows: int = 0
    tokens: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, rows: PackedRows) -> None:
        """Some more rows."""
        self.folder.mkdir(exist_ok=True)
        for name, kind in FILES.items():
            content = getattr(rows, name).numpy().astype(TYPES[kind], copy=False).tobytes()
            with open(file_of(self.folder, name), "ab") as file:
                file.write(content)
            self.digest.update(content)
        self.rows += len(rows)
        self.tokens += len(rows.tokens)


def mapped(folder: Path, pad_id: int) -> PackedRows:
    """The rows of one split; tokens, labels and positions stay on disk until a batch asks for them."""
    arrays: dict[str, Tensor] = {}
    for name, kind in FILES.items():
        path = file_of(folder, name)
        with warnings.catch_warnings():
            # torch warns of arrays that cannot be written to; nothing writes to these, and a mapping that could be written
            # to would have to fit into memory.
            warnings.simplefilter("ignore", UserWarning)
            arrays[name] = torch.from_numpy(np.memmap(path, TYPES[kind], mode="r"))
    starts = arrays["lengths"].cumsum(0) - arrays["lengths"]
    return PackedRows(**arrays, starts=starts, pad_id=pad_id)


def file_of(folder: Path, name: str) -> Path:
    """Where one of `FILES` lies."""
    return folder / f"{name}.{FILES[name]}"
