"""Rows of a split together with what was stored of the teacher for them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdtrain.tasks.code_lm.packing import LanguageBatch, PackedRows
from kdtrain.teacher_cache.token_cache import TENSORS, LanguageCache, row_keys


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
        """The given rows, padded, with what is stored of the teacher."""
        batch = self.rows.batch(index, device)
        keys, width = [self.keys[i] for i in index.tolist()], batch.input_ids.shape[1]
        found = tuple(self.cache.read(name, keys, width) for name in TENSORS[self.cache.signal.kind])
        if self.cache.signal.kind == "topk":
            inside = torch.arange(width) < self.lengths[index][:, None]
            return replace(batch, teacher_top=kept_tokens(found[0], found[1], inside, device))
        found = tuple(tensor.to(device) for tensor in found)
        if self.cache.signal.kind == "hidden":
            return replace(batch, teacher_hidden=found[0])
        return replace(batch, teacher_cross=found)

    def count(self, index: Tensor) -> int:
        """Labels that count in these rows."""
        return self.rows.count(index)


def kept_tokens(
    logprobs: Tensor, indices: Tensor, inside: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Stored tokens (B, N, K) as the loss takes them; rows where `inside` (B, N) is false are padding."""
    # Padding counts nowhere, but the ids of a row have to differ from each other.
    kept = logprobs.shape[-1]
    indices = torch.where(inside[..., None], indices.long(), torch.arange(kept))
    logprobs = logprobs.float().masked_fill(~inside[..., None], -math.log(kept))
    return logprobs.to(device), indices.to(device)
