"""Rows of a split together with what was stored of the teacher for them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdtrain.language.cache import LanguageCache, row_keys
from kdtrain.language.packing import LanguageBatch, PackedRows


@dataclass(frozen=True)
class CachedRows:
    """Packed rows whose batches carry the teacher's stored signal."""

    rows: PackedRows
    cache: LanguageCache
    keys: list[str]

    @classmethod
    def of(cls, rows: PackedRows, cache: LanguageCache) -> "CachedRows":
        """Every row must be stored."""
        return cls(rows, cache, row_keys(rows))

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def batch(self, index: Tensor, device: torch.device) -> LanguageBatch:
        """The given rows, padded, with hidden states or kept tokens of the teacher."""
        batch = self.rows.batch(index, device)
        keys, width = [self.keys[i] for i in index.tolist()], batch.input_ids.shape[1]
        if "hidden" in self.cache.shards[0]:
            return replace(batch, teacher_hidden=self.cache.read("hidden", keys, width).to(device))
        logprobs, indices = (self.cache.read(name, keys, width) for name in ("logprobs", "indices"))
        # Padding counts nowhere, but the ids of a row have to differ from each other.
        padding = (torch.arange(width) >= self.lengths[index][:, None])[..., None]
        kept = logprobs.shape[-1]
        indices = torch.where(padding, torch.arange(kept), indices.long())
        logprobs = logprobs.masked_fill(padding, -math.log(kept))
        return replace(batch, teacher_top=(logprobs.to(device), indices.to(device)))

    def count(self, index: Tensor) -> int:
        """Labels that count in these rows."""
        return self.rows.count(index)
