"""Documents in rows of equal length. A row may hold several; position ids start again at each, and attention with them.

Labels are shifted here and nowhere else: the label at a token is the token after it, where that one counts. They are
made before anything is cut, so the last token of a cut still knows what comes next, and no label reaches over the
end of its document.
"""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.outputs import IGNORED, Batch
from kdtrain.tasks.code_lm.documents import Documents


@dataclass(frozen=True)
class PackedRows:
    """All rows of a split: `tokens[starts[i] : starts[i] + lengths[i]]` is row i."""

    tokens: Tensor
    """(tokens,) int32"""
    labels: Tensor
    """(tokens,) int32"""
    positions: Tensor
    """(tokens,) int32"""
    starts: Tensor
    """(rows,) int64"""
    lengths: Tensor
    """(rows,) int64"""
    counted: Tensor
    """(rows,) int64: labels that count"""
    pad_id: int

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
        width: int | None = None,
    ) -> Batch:
        """The given rows, padded on the right to `width`, by default to the longest of them."""
        lengths = self.lengths[index]
        width = width or int(lengths.max())
        columns = torch.arange(width)
        inside = columns < lengths[:, None]
        source = torch.where(inside, self.starts[index][:, None] + columns, 0)
        # Padding counts on from the last document: it would open another one, and with it a mask of (N, N), for nothing.
        last = self.positions[self.starts[index] + lengths - 1].long()
        padding = columns - lengths[:, None] + last[:, None] + 1
        return Batch(
            input_ids=torch.where(inside, self.tokens[source].long(), self.pad_id).to(device),
            rows=index,
            position_ids=torch.where(inside, self.positions[source].long(), padding).to(device),
            labels=torch.where(inside, self.labels[source].long(), IGNORED).to(device),
        )

    def count(self, index: Tensor) -> int:
        """Labels that count in these rows."""
        return int(self.counted[index].sum())


def shifted_labels(documents: Documents) -> np.ndarray:
    """(tokens,) int32: the next token of the same document where it counts, else -100."""
    labels = np.full(len(documents.tokens), IGNORED, dtype=np.int32)
    labels[:-1] = np.where(documents.counts[1:], documents.tokens[1:], IGNORED)
    labels[documents.lengths.cumsum() - 1] = IGNORED
    return labels


def pack(documents: Documents, max_length: int, pad_id: int, *, packing: bool = True) -> PackedRows:
    """Lay documents into rows of at most `max_length` tokens.

    A document that fits is never cut. A longer one is cut into stretches of `max_length`; each is on its own from
    position 0. Stretches without a label that counts are left out. With `packing` a row takes stretches while they fit
    (the longest first, each into the fullest row that has room), else there is one stretch in a row.

    Raises:
        KdtrainError: no label counts at all.
    """
    labels = shifted_labels(documents)
    ends = documents.lengths.cumsum()
    stretches = [
        (first, min(max_length, end - first))
        for end, length in zip(ends.tolist(), documents.lengths.tolist(), strict=True)
        for first in range(end - length, end, max_length)
    ]
    sums = np.concatenate([[0], (labels != IGNORED).cumsum()])
    stretches = [(first, size) for first, size in stretches if sums[first + size] > sums[first]]
    if not stretches:
        raise KdtrainError(
            f"no token of {len(documents)} documents counts: every label is masked; look at the columns that the data "
            "section names, and whether prompts alone fill data.max_length"
        )
    rows = (
        best_fit([size for _, size in stretches], max_length)
        if packing
        else [[i] for i in range(len(stretches))]
    )
    order = [stretches[i] for row in rows for i in row]
    source = np.concatenate([np.arange(first, first + size) for first, size in order])
    lengths = torch.tensor([sum(stretches[i][1] for i in row) for row in rows])
    starts = lengths.cumsum(0) - lengths
    packed_labels = labels[source]
    total = np.concatenate([[0], (packed_labels != IGNORED).cumsum()])
    return PackedRows(
        tokens=torch.from_numpy(documents.tokens[source]),
        labels=torch.from_numpy(packed_labels),
        positions=torch.from_numpy(np.concatenate([np.arange(size, dtype=np.int32) for _, size in order])),
        starts=starts,
        lengths=lengths,
        counted=torch.from_numpy(total[(starts + lengths).numpy()] - total[starts.numpy()]),
        pad_id=pad_id,
    )


def best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Numbers of the given sizes in bins of `room`: the largest first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of open_bins, ascending
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(spaces, sizes[i])
        if place == len(spaces):
            number, space = len(bins), room
            bins.append([])
        else:
            space = spaces[place]
            number = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space], spaces[place]
        bins[number].append(i)
        left = space - sizes[i]
        if left:
            if left not in open_bins:
                bisect.insort(spaces, left)
            open_bins.setdefault(left, []).append(number)
    return bins


def padded_batch(inputs: dict[str, Tensor]) -> Batch:
    """A batch as transformers' collators make it: labels not shifted, padding on either side, perhaps packed.

    Args:
        inputs: `input_ids` and `labels` (B, N); `attention_mask` (B, N) where there is padding; `position_ids` (B, N)
            where several documents share a row, starting again at each. Labels are shifted here: the label at a
            token is the next one, unless that opens another document or is -100.

    Raises:
        KdtrainError: there are no labels.
    """
    if "labels" not in inputs:
        raise KdtrainError(
            f"a batch holds {', '.join(inputs)} and no labels, without which there is nothing to count; give the data set a "
            "column labels, or make them in the collator (DataCollatorForLanguageModeling(tokenizer, mlm=False))"
        )
    ids, labels = inputs["input_ids"], inputs["labels"]
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    places, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if places is None or mask is not None:
        inside = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        opens = torch.cat([torch.ones_like(inside[:, :1]), inside[:, 1:] != inside[:, :-1]], dim=1)
        if mask is not None:  # what is padded with may be a token that was added for the student alone
            ids = torch.where(inside, ids, 0)
        if places is not None:  # they may count on through the padding in front of a document
            opens[:, 1:] |= places[:, 1:] != places[:, :-1] + 1
        places = columns - torch.where(opens, columns, 0).cummax(dim=1).values
    after = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    ends = torch.cat([places[:, 1:] == 0, torch.ones_like(places[:, :1], dtype=torch.bool)], dim=1)
    labels = torch.where(ends, IGNORED, after)
    return Batch(ids, labels, torch.arange(len(ids)), position_ids=places)
