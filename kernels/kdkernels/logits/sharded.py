"""`linear_kd_loss(vocab_group=...)`: every rank holds a shard of the vocabulary, of both heads, and of no other rank's.

Hidden states and labels are the same on all ranks. A rank makes the logits of its own shard, the row work runs in the
three passes of `by_vocabulary`, and between them the ranks merge the states of their rows: one maximum and two sums of a few
numbers per row. The gradient of the hidden states is summed over the ranks, so every rank has the loss and the gradient
that one process with the whole vocabulary would have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.row_state import (
    CE_MAX,
    LOGIT_SUM,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    rescale,
)

# Slots by what the ranks do with them. Slices, as a list of slots would be copied from the host, a sync.
_MAXIMA, _SUMS = slice(STUDENT_MAX, STUDENT_SUM), slice(STUDENT_SUM, LOGIT_SUM + 1)


@dataclass(frozen=True)
class Shard:
    """One rank's shard of the vocabulary: columns [offset, offset + V) of `total`."""

    group: dist.ProcessGroup
    offset: int
    total: int
    chunk_rows: int  # rows of a chunk, the same on every rank, since the ranks meet in each chunk

    def merge_statistics(self, state: Tensor, temperature: float) -> None:
        """The first nine slots of the whole vocabulary from those of every shard."""
        maxima = state[_MAXIMA].clone()
        dist.all_reduce(maxima, dist.ReduceOp.MAX, self.group)
        for slot, of_exponent in ((STUDENT_MAX, temperature), (TEACHER_MAX, temperature), (CE_MAX, 1.0)):
            total = state[slot + STUDENT_SUM]
            total.copy_(rescale(total, state[slot], maxima[slot], of_exponent))
        state[_MAXIMA] = maxima
        self.add(state[_SUMS])

    def add(self, numbers: Tensor) -> None:
        """The numbers become their sums over the ranks."""
        dist.all_reduce(numbers, dist.ReduceOp.SUM, self.group)


def shard_of(group: object, rows: int, columns: int, chunk_rows: int, device: torch.device) -> Shard:
    """This rank's shard of `columns` columns; ranks hold their shards in the order of their numbers.

    The ranks exchange their sizes in every call. A memory of earlier calls would save this one host sync, but a rank that
    remembers a size beside one that does not would make that one hang.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"vocab_group must be a process group of torch.distributed, got {type(group).__name__}; "
            "pass torch.distributed.group.WORLD or what new_group returned"
        )
    mine = torch.tensor([rows, columns, chunk_rows], device=device)
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group)
    every_rows, every_columns, every_chunk = torch.stack(sizes, 1).tolist()
    if len(set(every_rows)) != 1:
        raise ValueError(
            f"the ranks of vocab_group must have the same rows, got {every_rows} rows on ranks 0 to "
            f"{group.size() - 1}; pass the same student_hidden and labels on all of them"
        )
    return Shard(group, sum(every_columns[: group.rank()]), sum(every_columns), min(every_chunk))
