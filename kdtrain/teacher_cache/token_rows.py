"""Rows of a split together with what was stored of the teacher for them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdtrain.outputs import Batch
from kdtrain.tasks.code_lm.packing import PackedRows
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

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows, padded, with what is stored of the teacher."""
        batch = self.rows.batch(index, device)
        if not stored:
            return batch
        keys, width = [self.keys[i] for i in index.tolist()], batch.input_ids.shape[1]
        found = tuple(self.cache.read(name, keys, width) for name in TENSORS[self.cache.signal.kind])
        if self.cache.signal.kind == "topk":
            inside = torch.arange(width) < self.lengths[index][:, None]
            found = kept_tokens(found[0], found[1], inside, device)
        names = TENSORS[self.cache.signal.kind]
        outputs = {name: tensor.to(device) for name, tensor in zip(names, found, strict=True)}
        return replace(batch, stored={"teacher": outputs})

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
