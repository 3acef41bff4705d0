"""Rows of code, and the masking of some of their tokens.

Which tokens are masked is a function of seed, step and row alone: micro-batches, processes or resuming after a kill
mask the same ones. How many are masked follows from the length of the row, so the divisor of a mean is known before
anything runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.data.handlers import Function, masked
from kdtrain.data.tokens import TokenRows, special_affixes, tokenize
from kdtrain.outputs import IGNORED, Batch

SHARE = 0.15
"""Of a row's tokens, the part that is masked (RoBERTa's, arXiv 1907.11692)."""
TOKENIZE_TEXTS = 512


@dataclass(frozen=True, kw_only=True)
class MaskedBatch(Batch):
    """One micro-batch; labels hold what stood at a masked token."""

    is_name: Tensor
    """(B, N) bool: where the masked exception name is predicted; the label is the name's first sub-token"""


@dataclass(frozen=True)
class MaskedRows:
    """Training or held-out rows, on the host."""

    rows: TokenRows
    names: Tensor | None
    """(rows,) int64, the first sub-token of the exception name masked in each; None for plain text"""
    special: Tensor
    """ids that are never masked"""
    name_id: int | None
    """id of the marker where a name was"""
    free: Tensor
    """(rows,) int64: tokens of each row that may be masked"""
    masking: "TokenMasking"

    @classmethod
    def of(
        cls,
        rows: TokenRows,
        names: Tensor | None,
        tokenizer: PreTrainedTokenizerBase,
        marker: str | None,
        seed: int = 0,
    ) -> "MaskedRows":
        """Count what may be masked; rows in which nothing may, such as those of empty documents, are left out."""
        special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
        name_id = None if marker is None else tokenizer.get_vocab()[marker]
        total = torch.cat([torch.zeros(1, dtype=torch.int64), (~torch.isin(rows.tokens, special)).cumsum(0)])
        free = total[rows.starts + rows.lengths] - total[rows.starts]
        kept = free > 0
        rows = TokenRows(rows.tokens, rows.starts[kept], rows.lengths[kept], rows.pad_id)
        mask_id = tokenizer.get_vocab()[str(tokenizer.mask_token)]
        masking = TokenMasking(special, mask_id, len(tokenizer), seed)
        return cls(rows, None if names is None else names[kept], special, name_id, free[kept], masking)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def batch(
        self,
        rows: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> MaskedBatch:
        """The given rows, padded, with the tokens of this step masked; those of step 0 are fixed and measure.

        Every name weighs as much as needed for the sum over all names of the `whole` batch, divided as that over its
        tokens, to be their mean.
        """
        input_ids, attention_mask = self.rows.batch(rows)
        labels = torch.full_like(input_ids, IGNORED)
        is_name, weight = torch.zeros_like(input_ids, dtype=torch.bool), None
        if self.names is not None:
            is_name = input_ids == self.name_id
            is_name[:, 0] = True  # a classifier will read from here
            labels = torch.where(is_name, self.names[rows][:, None], labels)
            scale = 1.0 if whole is None else self.count(whole) / (2 * len(whole))
            weight = torch.where(is_name, scale, 1.0).to(device)
        ids, labels = self.masking.apply(input_ids, attention_mask, labels, rows.tolist(), step)
        return MaskedBatch(
            input_ids=ids.to(device),
            labels=labels.to(device),
            rows=rows,
            attention_mask=attention_mask.to(device),
            token_weight=weight,
            is_name=is_name.to(device),
        )

    def count(self, index: Tensor) -> int:
        """Tokens that are masked in these rows."""
        return int(masked_count(self.free[index]).sum())


def masked_count(free: Tensor) -> Tensor:
    """How many of `free` tokens are masked: 15 %, rounded, at least one where there is any."""
    return torch.minimum(free, (free * SHARE).round().long().clamp(min=1))


@dataclass(frozen=True)
class TokenMasking:
    """How tokens are masked: of the chosen ones 80 % become <mask>, 10 % a random token, 10 % stay."""

    special: Tensor
    mask_id: int
    vocabulary: int
    seed: int

    def apply(
        self, ids: Tensor, attention_mask: Tensor, labels: Tensor, rows: Sequence[int], step: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and labels (B, N) of the given rows with the tokens of this step masked."""
        ids, labels = ids.clone(), labels.clone()
        free = (attention_mask == 1) & ~torch.isin(ids, self.special)
        counts = masked_count(free.sum(dim=1)).tolist()
        for i, row in enumerate(rows):
            generator = np.random.default_rng([self.seed, step, row])
            places = free[i].nonzero().flatten().numpy()
            chosen = torch.from_numpy(generator.choice(places, counts[i], replace=False))
            draw = torch.from_numpy(generator.random(counts[i]))
            others = torch.from_numpy(generator.integers(self.vocabulary, size=counts[i]))
            labels[i, chosen] = ids[i, chosen]
            ids[i, chosen] = torch.where(
                draw < 0.8, self.mask_id, torch.where(draw < 0.9, others, ids[i, chosen])
            )
        return ids, labels


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


def masked_name_rows(
    functions: Sequence[Function], tokenizer: PreTrainedTokenizerBase, max_length: int, marker: str
) -> tuple[TokenRows, Tensor]:
    """One row for each handler and for the first `raise` of each function, and the masked names.

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
