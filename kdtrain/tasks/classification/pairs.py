"""A split as tokens, whether a row is one text or two."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.data.tokens import TokenRows, tokenize
from kdtrain.tasks.classification.rows import TextRows


@dataclass(frozen=True)
class PairRows:
    """Rows of two texts for one model; each distinct text is kept once."""

    texts: TokenRows
    index: Tensor
    """(rows, 2) int64, rows of `texts`"""

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64: what a row costs, twice its longer text."""
        return 2 * self.texts.lengths[self.index].amax(dim=1)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Give `input_ids` and `attention_mask`, both (B, 2, N) int64, of the given row numbers."""
        input_ids, mask = self.texts.batch(self.index[rows].flatten())
        return input_ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


Rows = TokenRows | PairRows


def tokenize_split(
    split: TextRows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    focus: str | None = None,
    insert: tuple[int, ...] = (),
) -> Rows:
    """Tokenize every row of a split; see `tokenize` for what is cut and where `insert` goes."""
    if split.seconds is None:
        return tokenize(split.texts, tokenizer, max_length, focus, insert)
    distinct = {text: i for i, text in enumerate(split.all_texts())}
    index = [[distinct[a], distinct[b]] for a, b in zip(split.texts, split.seconds, strict=True)]
    texts = tokenize(list(distinct), tokenizer, max_length, focus, insert)
    return PairRows(texts, torch.tensor(index, dtype=torch.int64).reshape(-1, 2))
