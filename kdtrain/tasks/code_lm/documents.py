"""Documents as tokens, and which of their tokens the student learns to predict.

Three kinds of row, told apart by their columns: `text` (every token counts), `prompt` and `completion` (the completion
counts), `messages` (what the assistant says counts).
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdtrain.console import say
from kdtrain.data.tokens import special_affixes
from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageDataSection

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TOKENIZE_DOCUMENTS = 512
WINDOW_TOKENS = 1 << 22


@dataclass(frozen=True)
class Documents:
    """All documents of a split, end to end."""

    tokens: np.ndarray
    """(tokens,) int32"""
    counts: np.ndarray
    """(tokens,) bool: whether the student is to predict this token"""
    lengths: np.ndarray
    """(documents,) int64"""

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """SHA-256 over tokens, counts and lengths."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.counts, self.lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]

    def select(self, chosen: np.ndarray) -> "Documents":
        """The documents where `chosen` (documents,) bool is true."""
        tokens = np.repeat(chosen, self.lengths)
        return Documents(self.tokens[tokens], self.counts[tokens], self.lengths[chosen])


def load_documents(
    recipe: LanguageDataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[Documents, Documents]:
    """Training and held-out documents, tokenized; each ends in the tokenizer's end-of-text token.

    Without `data.valid`, documents are held out by a hash of their content, so equal ones stay on one side.

    Raises:
        KdtrainError: nothing to read, other columns, a tokenizer without end-of-text token or chat template.
    """
    train = tokenize_documents(read_rows(recipe.train, "data.train", recipe), recipe, tokenizer)
    if recipe.valid is not None:
        return train, load_held_out(recipe, tokenizer)
    held_out = is_held_out(train, recipe)
    if not held_out.any() or held_out.all():
        raise KdtrainError(
            f"data.held_out {recipe.held_out} leaves {held_out.sum()} of {len(train)} documents to measure on and "
            f"{(~held_out).sum()} to train on; name a data.valid or change the share"
        )
    return train.select(~held_out), train.select(held_out)


def load_held_out(recipe: LanguageDataSection, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """The held-out documents alone; where they are held out from the training ones, those are read but not kept."""
    if recipe.valid is not None:
        return tokenize_documents(read_rows(recipe.valid, "data.valid", recipe), recipe, tokenizer)
    windows = document_windows(read_rows(recipe.train, "data.train", recipe), recipe, tokenizer)
    return joined([window.select(is_held_out(window, recipe)) for window in windows])


def is_held_out(documents: Documents, recipe: LanguageDataSection) -> np.ndarray:
    """(documents,) bool: whether a document is measured on and not trained on, by a hash of its tokens."""
    ends = documents.lengths.cumsum()
    hashes = [
        int.from_bytes(hashlib.sha256(documents.tokens[end - length : end].tobytes()).digest()[:4], "big")
        for end, length in zip(ends, documents.lengths, strict=True)
    ]
    return np.array(hashes) < recipe.held_out * 2**32


def joined(parts: list[Documents]) -> Documents:
    """Several, one after the other."""
    columns = ([getattr(part, name) for part in parts] for name in ("tokens", "counts", "lengths"))
    return Documents(*(np.concatenate(column) for column in columns))


def read_rows(path: str, field: str, recipe: LanguageDataSection) -> Iterator[dict[str, Any]]:
    """The rows behind a recipe's path, one dictionary each; nothing is downloaded for a local path."""
    place = Path(path).expanduser()
    if place.is_dir() and not (place / "dataset_info.json").exists():
        yield from _source_files(place, field, recipe.suffixes)
        return
    if place.suffix == ".txt" and place.is_file():
        try:
            text = place.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise KdtrainError(f"{field}: {path} is not UTF-8 ({error}); convert it") from None
        yield {recipe.text: text}
        return
    if place.is_file() and not place.stat().st_size:
        raise KdtrainError(f"{field}: {path} is empty")
    if not place.exists() and path.startswith((".", "/", "~")):
        raise KdtrainError(f"{field}: there is no file or folder {path}")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if place.is_dir():
            yield from _dictionaries(datasets.load_from_disk(str(place)))
        elif place.is_file() and place.suffix in READERS:
            kind = READERS[place.suffix]
            yield from _dictionaries(
                datasets.load_dataset(kind, data_files=str(place), split="train", streaming=True)
            )
        elif place.is_file():
            raise KdtrainError(
                f"{field}: {path} is none of .txt, {', '.join(READERS)}, a folder, or the id of a data set"
            )
        else:
            yield from _dictionaries(datasets.load_dataset(path, split=recipe.split, streaming=True))
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, KdtrainError):
            raise
        reason = str(error).strip().splitlines()[0]
        words = path if place.exists() else f"{path}, which is no file or folder here,"
        raise KdtrainError(f"{field}: {words} could not be read as a data set: {reason}") from None


def _dictionaries(rows: Any) -> Iterator[dict[str, Any]]:
    if isinstance(rows, dict):
        raise KdtrainError(f"the data set holds the splits {', '.join(rows)}; name the folder of one of them")
    for row in rows:
        yield dict(row)


def _source_files(folder: Path, field: str, suffixes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    if not paths:
        raise KdtrainError(f"{field}: {folder} holds no file that ends in {' or '.join(suffixes)}")
    refused = 0
    for path in paths:
        try:
            yield {"text": path.read_text(encoding="utf-8")}
        except (UnicodeDecodeError, OSError):
            refused += 1
    if refused:
        say(f"{field}: {refused} of {len(paths)} files in {folder} are not readable UTF-8 and were left out")


def tokenize_documents(
    rows: Iterator[dict[str, Any]], recipe: LanguageDataSection, tokenizer: PreTrainedTokenizerBase
) -> Documents:
    """Tokenize rows of one kind."""
    return joined(list(document_windows(rows, recipe, tokenizer)))


def document_windows(
    rows: Iterator[dict[str, Any]],
    recipe: LanguageDataSection,
    tokenizer: PreTrainedTokenizerBase,
    window_tokens: int = WINDOW_TOKENS,
) -> Iterator[Documents]:
    """Tokenize rows of one kind, and give them as they come: each time the documents of at least `window_tokens` tokens.

    Raises:
        KdtrainError: there is not one document.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise KdtrainError(
            "the tokenizer has no end-of-text token (eos_token), so a student could not learn to stop"
        )
    found: list[tuple[np.ndarray, np.ndarray]] = []
    size, empty = 0, True
    while batch := list(itertools.islice(rows, TOKENIZE_DOCUMENTS)):
        made = [
            (np.array(ids, dtype=np.int32), counted) for ids, counted in _tokenize(batch, recipe, tokenizer)
        ]
        found += made
        size += sum(len(ids) for ids, _ in made)
        if size >= window_tokens:
            yield _documents(found)
            found, size, empty = [], 0, False
    if found:
        yield _documents(found)
    elif empty:
        raise KdtrainError("the data holds no document")


def _documents(found: list[tuple[np.ndarray, np.ndarray]]) -> Documents:
    lengths = np.array([len(ids) for ids, _ in found], dtype=np.int64)
    return Documents(
        np.concatenate([ids for ids, _ in found]), np.concatenate([counted for _, counted in found]), lengths
    )


def _tokenize(
    rows: list[dict[str, Any]], recipe: LanguageDataSection, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], np.ndarray]]:
    columns = rows[0]
    start, _ = special_affixes(tokenizer)
    end = [tokenizer.eos_token_id]
    if recipe.messages in columns:
        for number, row in enumerate(rows):
            messages = row[recipe.messages]
            if not messages or any(
                not isinstance(message, dict) or not isinstance(message.get("role"), str)
                for message in messages
            ):
                raise KdtrainError(
                    f"column {recipe.messages} must hold lists of messages with role and content, got {messages!r:.80}"
                )
            yield _conversation(messages, number, tokenizer)
    elif recipe.prompt in columns and recipe.completion in columns:
        prompts = _ids(tokenizer, [_text(row, recipe.prompt) for row in rows])
        completions = _continuations(tokenizer, [_text(row, recipe.completion) for row in rows])
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = [*start, *prompt, *completion, *end]
            yield ids, np.arange(len(ids)) >= len(start) + len(prompt)
    elif recipe.text in columns:
        for body in _ids(tokenizer, [_text(row, recipe.text) for row in rows]):
            ids = [*start, *body, *end]
            yield ids, np.arange(len(ids)) >= len(start)
    else:
        raise KdtrainError(
            f"the data has the columns {', '.join(columns)} and none of data.text ({recipe.text}), data.prompt with "
            f"data.completion ({recipe.prompt}, {recipe.completion}) or data.messages ({recipe.messages})"
        )


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise KdtrainError(f"column {column} must hold text, got {value!r:.80}")
    return value


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """As `_ids`, of texts that go on from others: without the space that some tokenizers put in front of every text."""
    alone = _ids(tokenizer, texts)
    letter, line_end = _ids(tokenizer, ["x", "\n"])
    if tokenizer.decode([*letter, *letter]) == "xx":
        return alone
    behind = _ids(tokenizer, ["\n" + text for text in texts])
    size = len(line_end)
    return [
        after[size:] if after[:size] == line_end else ids for ids, after in zip(alone, behind, strict=True)
    ]


def _conversation(
    messages: list[dict[str, str]], number: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], np.ndarray]:
    """A rendered conversation; a token counts when it starts inside of what the assistant says."""
    if tokenizer.chat_template is None:
        raise KdtrainError("the data holds conversations, but the tokenizer has no chat template")

    def render(count: int, *, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask))

    text = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, ask=True), render(i + 1)
            if not (after.startswith(before) and text.startswith(after)):
                raise KdtrainError(
                    f"the chat template changes what it said before when message {i} of conversation {number} is added, so "
                    "the tokens of the assistant cannot be told; use prompt and completion columns"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if "offset_mapping" not in encoded:
        raise KdtrainError(
            f"the tokenizer ({type(tokenizer).__name__}) does not say where in a text its tokens stand, so those of the assistant "
            "cannot be told; use prompt and completion columns, or a tokenizer with a tokenizer.json"
        )
    starts = np.array([start for start, _ in encoded["offset_mapping"]])
    counted = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        counted |= (starts >= first) & (starts < last)
    return list(encoded["input_ids"]), counted
