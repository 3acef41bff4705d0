"""Rows as tokens: cut around the focus marker, kept in one flat tensor, padded only when a batch is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.errors import KdtrainError

SHARE_BEFORE_FOCUS = 0.6
"""Of the tokens kept of a long row, the share that lies before the focus marker."""

ENCODER_MODE = ("<encoder-only>", "</s>")
"""What UniXcoder wants behind its first token to read as an encoder."""

TOKENIZE_ROWS = 2048
MEGABATCHES = 50


@dataclass(frozen=True)
class TokenRows:
    """All rows of a split for one model: `tokens[starts[i] : starts[i] + lengths[i]]` is row i."""

    tokens: Tensor
    """(sum of lengths,) int32"""
    starts: Tensor
    """(rows,) int64"""
    lengths: Tensor
    """(rows,) int64"""
    pad_id: int

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Give `input_ids` and `attention_mask`, both (B, N) int64, of the given row numbers; N is the longest of them.

        Padding goes to the right whatever the tokenizer's own setting: classifiers read the first token.
        """
        lengths = self.lengths[rows]
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        source = torch.where(mask, self.starts[rows][:, None] + columns, 0)
        return self.tokens[source].long().masked_fill_(~mask, self.pad_id), mask.long()


def tokenize(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    focus: str | None = None,
    insert: tuple[int, ...] = (),
) -> TokenRows:
    """Tokenize each row, special tokens included, into at most `max_length` tokens.

    `insert` are ids that a model wants behind its own first token, such as UniXcoder's mode.

    A longer row keeps its head, or with `focus` a window with the marker in it: 60 % before, 40 % after.
    The marker is found by its token where the tokenizer has one, else by its place in the text.
    """
    prefix, suffix = special_affixes(tokenizer)
    prefix = [*prefix, *insert]
    budget = max_length - len(prefix) - len(suffix)
    focus_id = token_id(tokenizer, focus)
    by_offset = focus is not None and focus_id is None
    rows: list[np.ndarray] = []
    for first in range(0, len(texts), TOKENIZE_ROWS):
        chunk = list(texts[first : first + TOKENIZE_ROWS])
        encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=by_offset, verbose=False)
        for i, ids in enumerate(encoded["input_ids"]):
            start = 0
            if len(ids) > budget and focus is not None:
                if by_offset:
                    place = _token_at(encoded["offset_mapping"][i], chunk[i].find(focus))
                else:
                    place = ids.index(focus_id) if focus_id in ids else None
                start = window_start(len(ids), budget, place)
            rows.append(np.array([*prefix, *ids[start : start + budget], *suffix], dtype=np.int32))
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    pad_id = tokenizer.pad_token_id
    return TokenRows(
        tokens=torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0, dtype=torch.int32),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        pad_id=pad_id if isinstance(pad_id, int) else 0,  # masked, so any id will do
    )


def window_start(length: int, budget: int, place: int | None) -> int:
    """First token of the kept window of a row of `length` tokens whose focus is token `place`."""
    if place is None:
        return 0
    return max(0, min(place - round(SHARE_BEFORE_FOCUS * budget), length - budget))


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and after every row."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    start = next(i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    """The id of `token` where the vocabulary has it as one entry, else None."""
    return None if token is None else tokenizer.get_vocab().get(token)


def inserted_ids(
    tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...] | None, field: str, path: str
) -> tuple[int, ...]:
    """The ids that a model wants behind its first token.

    Args:
        tokens: as the recipe names them; None takes UniXcoder's mode where the vocabulary has it.
        field: the recipe key that is blamed.
        path: where the tokenizer is from.
    """
    if tokens is None:  # UniXcoder's vocabulary is known by this token
        tokens = ENCODER_MODE if token_id(tokenizer, ENCODER_MODE[0]) is not None else ()
    ids = [token_id(tokenizer, token) for token in tokens]
    if None in ids:
        missing = tokens[ids.index(None)]
        raise KdtrainError(f"{field} names {missing!r}, which the tokenizer of {path} lacks")
    return tuple(number for number in ids if number is not None)


def epoch_batches(
    lengths: Tensor, batch_size: int, seed: int, epoch: int, *, group_by_length: bool = True
) -> list[Tensor]:
    """Divide one epoch into batches; a pure function of its arguments.

    Args:
        lengths: (rows,) tokens of every row.
        group_by_length: all rows are shuffled, sorted by length within every 50 batches, divided, and the batches shuffled
            again; otherwise the shuffled rows are divided as they come.

    Returns:
        Row numbers of every batch; only one batch may be smaller than `batch_size`.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    lengths_array = lengths.numpy()
    size = MEGABATCHES * batch_size
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    batches = []
    for group in groups:
        ordered = group[np.argsort(-lengths_array[group], kind="stable")] if group_by_length else group
        batches += [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    return [torch.from_numpy(batches[i]) for i in generator.permutation(len(batches))]


def token_budget_batches(lengths: Tensor, tokens: int) -> list[Tensor]:
    """Cut all rows, longest first, into batches of at most `tokens` padded tokens (one row at least)."""
    order = torch.argsort(lengths, descending=True, stable=True)
    batches, first = [], 0
    while first < len(order):
        count = max(1, tokens // max(1, int(lengths[order[first]])))
        batches.append(order[first : first + count])
        first += count
    return batches


def _token_at(offsets: list[tuple[int, int]], character: int) -> int | None:
    if character < 0:
        return None
    return next((i for i, (_, end) in enumerate(offsets) if end > character), None)
