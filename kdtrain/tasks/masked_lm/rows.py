"""Rows of code, whole, and the hiding of some of their tokens.

Which tokens are hidden is a function of seed, step and row alone: cutting a batch into pieces, sharing it between
processes or going on after a kill hides the same ones. How many are hidden follows from the row's length, so what a
mean divides by is known before anything runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.data.handlers import Function, masked
from kdtrain.data.tokens import TokenRows, special_affixes, tokenize

IGNORED = -100
SHARE = 0.15
"""Of a row's tokens, the part that is hidden (RoBERTa's, arXiv 1907.11692)."""
TOKENIZE_TEXTS = 512


@dataclass(frozen=True)
class MaskedBatch:
    """One piece of a batch."""

    input_ids: Tensor
    """(B, N) int64"""
    attention_mask: Tensor
    """(B, N) int64"""
    labels: Tensor
    """(B, N) int64: what stands at a hidden token, and -100 elsewhere"""
    is_name: Tensor
    """(B, N) bool: where the hidden exception name is to be told; its label is the name's first sub-token"""
    name_scale: float = 0.0
    """what the sum over names is multiplied by, beside the sum over tokens"""


@dataclass(frozen=True)
class MaskedRows:
    """Training or held-out rows, on the host, with nothing hidden yet."""

    rows: TokenRows
    names: Tensor | None
    """(rows,) int64, the first sub-token of the exception name hidden in each; None for plain text"""
    special: Tensor
    """ids that are never hidden"""
    name_id: int | None
    """id of the marker where a name was"""
    free: Tensor
    """(rows,) int64: tokens of each row that may be hidden"""

    @classmethod
    def of(
        cls, rows: TokenRows, names: Tensor | None, tokenizer: PreTrainedTokenizerBase, marker: str | None
    ) -> "MaskedRows":
        """Count what may be hidden; rows in which nothing may, such as those of empty documents, are left out."""
        special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
        name_id = None if marker is None else tokenizer.get_vocab()[marker]
        total = torch.cat([torch.zeros(1, dtype=torch.int64), (~torch.isin(rows.tokens, special)).cumsum(0)])
        free = total[rows.starts + rows.lengths] - total[rows.starts]
        kept = free > 0
        rows = TokenRows(rows.tokens, rows.starts[kept], rows.lengths[kept], rows.pad_id)
        return cls(rows, None if names is None else names[kept], special, name_id, free[kept])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def batch(self, index: Tensor, device: torch.device) -> MaskedBatch:
        """The given rows, padded, still on the host: `MaskedObjective` hides tokens by step and takes them along."""
        input_ids, attention_mask = self.rows.batch(index)
        labels = torch.full_like(input_ids, IGNORED)
        is_name = torch.zeros_like(input_ids, dtype=torch.bool)
        if self.names is not None:
            is_name = input_ids == self.name_id
            is_name[:, 0] = True  # a classifier will read from here
            labels = torch.where(is_name, self.names[index][:, None], labels)
        return MaskedBatch(input_ids, attention_mask, labels, is_name)

    def count(self, index: Tensor) -> int:
        """Tokens that are hidden in these rows."""
        return int(hidden_count(self.free[index]).sum())


def hidden_count(free: Tensor) -> Tensor:
    """How many of `free` tokens are hidden: 15 %, rounded, at least one where there is any."""
    return torch.minimum(free, (free * SHARE).round().long().clamp(min=1))


@dataclass(frozen=True)
class Hiding:
    """How tokens are hidden: of the chosen ones 80 % become <mask>, 10 % a random token, 10 % stay."""

    special: Tensor
    mask_id: int
    vocabulary: int
    seed: int

    def apply(self, batch: MaskedBatch, rows: Sequence[int], step: int) -> MaskedBatch:
        """Hide tokens of the given rows for this step (0: the fixed ones that measure)."""
        ids, labels = batch.input_ids.clone(), batch.labels.clone()
        free = (batch.attention_mask == 1) & ~torch.isin(ids, self.special)
        counts = hidden_count(free.sum(dim=1)).tolist()
        for i, row in enumerate(rows):
            generator = np.random.default_rng([self.seed, step, row])
            places = free[i].nonzero().flatten().numpy()
            chosen = torch.from_numpy(generator.choice(places, counts[i], replace=False))
            fate = torch.from_numpy(generator.random(counts[i]))
            others = torch.from_numpy(generator.integers(self.vocabulary, size=counts[i]))
            labels[i, chosen] = ids[i, chosen]
            ids[i, chosen] = torch.where(
                fate < 0.8, self.mask_id, torch.where(fate < 0.9, others, ids[i, chosen])
            )
        return MaskedBatch(ids, batch.attention_mask, labels, batch.is_name, batch.name_scale)


def text_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenRows:
    """Documents one after the other, each closed by the end token, cut into rows of `max_length` tokens.

    Every row stands between the tokenizer's own first and last tokens; the last row may be shorter.
    """
    prefix, suffix = special_affixes(tokenizer)
    parts, waiting = [], []

    def finish() -> None:
        for ids in tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array([*ids, *suffix[:1]], dtype=np.int32))
        waiting.clear()

    for text in texts:
        waiting.append(text)
        if len(waiting) == TOKENIZE_TEXTS:
            finish()
    if waiting:
        finish()
    flat = np.concatenate([*parts, np.zeros(0, dtype=np.int32)])
    budget = max_length - len(prefix) - len(suffix)
    rows = [
        np.concatenate([prefix, flat[first : first + budget], suffix]).astype(np.int32)
        for first in range(0, len(flat), budget)
    ]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.from_numpy(np.concatenate([*rows, np.zeros(0, dtype=np.int32)]))
    pad_id = tokenizer.pad_token_id
    return TokenRows(tokens, lengths.cumsum(0) - lengths, lengths, pad_id if isinstance(pad_id, int) else 0)


def hidden_name_rows(
    functions: Sequence[Function], tokenizer: PreTrainedTokenizerBase, max_length: int, marker: str
) -> tuple[TokenRows, Tensor]:
    """One row for each handler and for the first `raise` of each function, and the hidden names.

    The names are (rows,) int64, the first sub-token of each. Later `raise` statements mostly repeat the first.
    """
    texts, names = [], []
    for function in functions:
        raises = [hole for hole in function.holes if hole.raised]
        for hole in [hole for hole in function.holes if not hole.raised] + raises[:1]:
            texts.append(masked(function, hole))
            names.append(" " + function.text[hole.start : hole.end].split(".")[-1].strip("( "))
    first = [ids[0] for ids in tokenizer(names, add_special_tokens=False)["input_ids"]] if names else []
    return tokenize(texts, tokenizer, max_length, marker), torch.tensor(first, dtype=torch.int64)
