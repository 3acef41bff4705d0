"""The code that a masked language model learns from: documents, or functions with exception names."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kdtrain.data.exceptions import collect_functions, source_files, without_duplicates
from kdtrain.data.handlers import HOLE, Function
from kdtrain.data.sources import split_of
from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageDataSection, MaskedDataSection
from kdtrain.tasks.code_lm.documents import read_rows
from kdtrain.tasks.masked_lm.rows import MaskedRows, masked_name_rows, text_rows

TOKENIZER_CHARACTERS = 200_000_000
"""Of the training code, how much at most the tokenizer is trained on; more changes nothing but the time."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out code of one kind."""

    train: list[str] | list[Function]
    valid: list[str] | list[Function]
    marker: str | None = None
    """takes the place of a masked name"""
    about: dict[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """What a tokenizer is trained on."""
        left = TOKENIZER_CHARACTERS
        for one in self.train:
            text = one.text if isinstance(one, Function) else one
            left -= len(text)
            if left < 0:
                return
            yield text

    def fingerprint(self) -> str:
        """A hash of all code, and of the names that are masked in it."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid):
            digest.update(f"{len(part)}\n".encode())
            for one in part:
                content = f"{one.text}\n{one.holes}" if isinstance(one, Function) else one
                digest.update(hashlib.sha256(content.encode()).digest())
        return digest.hexdigest()[:32]

    def rows(
        self, part: list[str] | list[Function], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
    ) -> MaskedRows:
        """A side of it in tokens.

        Raises:
            KdtrainError: it holds nothing that could be masked.
        """
        if self.marker is None:
            texts = (one for one in part if isinstance(one, str))
            rows = MaskedRows.of(text_rows(texts, tokenizer, max_length), None, tokenizer, None, seed)
            if not len(rows):
                raise KdtrainError(
                    f"no token of {len(part)} documents of data.train can be masked: all of them are empty; name more code, or "
                    "another data.held_out"
                )
            return rows
        functions = [one for one in part if isinstance(one, Function)]
        rows, names = masked_name_rows(functions, tokenizer, max_length, self.marker)
        return MaskedRows.of(rows, names, tokenizer, self.marker, seed)


def load_corpus(recipe: MaskedDataSection) -> Corpus:
    """Read the code that a recipe names.

    Raises:
        KdtrainError: nothing to read, a column that is missing, or no row left on one of the sides.
    """
    corpus = _functions(recipe) if recipe.kind == "exceptions" else _documents(recipe)
    if not corpus.train or not corpus.valid:
        what, more = ("functions", "") if corpus.marker else ("documents", ", or another data.held_out")
        raise KdtrainError(
            f"the code of data.train leaves {len(corpus.train)} {what} to train on and {len(corpus.valid)} to measure "
            f"on; name more code{more}"
        )
    return corpus


def _documents(recipe: MaskedDataSection) -> Corpus:
    """Equal documents are on one side: a hash of the content decides."""
    given = LanguageDataSection(
        train=recipe.train[0], suffixes=recipe.suffixes, split=recipe.split, text=recipe.text
    )
    rows = itertools.chain.from_iterable(read_rows(path, "data.train", given) for path in recipe.train)
    sides: tuple[list[str], list[str]] = ([], [])
    for text in _texts(rows, recipe.text):
        digest = hashlib.sha256(text.encode()).digest()
        sides[int.from_bytes(digest[:4], "big") < recipe.held_out * 2**32].append(text)
    return Corpus(*sides, about={"documents": len(sides[0])})


def _texts(rows: Iterable[dict[str, Any]], column: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        text = row.get(column, row.get("text"))  # files of source code come under `text`
        if not isinstance(text, str):
            raise KdtrainError(
                f"row {number} of data.train has no text in column {column!r} (columns: {', '.join(row)}); set data.text"
            )
        yield text


def _functions(recipe: MaskedDataSection) -> Corpus:
    """The training side of the exception task, and its validation side to measure on; the test side is never read.

    Of near duplicates the one on the test side stays, so none of its copies is learned from.
    """
    files, distributions = source_files(
        [Path(folder) for folder in recipe.train], [Path(folder) for folder in recipe.site_packages]
    )
    functions = without_duplicates(collect_functions(files, raises=True))
    train, valid = ([one for one in functions if split_of(one.module) == side] for side in ("train", "valid"))
    about = {"functions": len(train), "sources": [asdict(one) for one in distributions]}
    return Corpus(train, valid, HOLE, about)
