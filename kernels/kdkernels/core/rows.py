"""Which rows are valid, how much each counts, and what a mean divides by. Nothing here is a host sync, but `compact_rows`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import NORM_EPS
from .compiling import values_can_be_read


@dataclass(frozen=True, eq=False)
class RowWeights:
    """`weight` (N,) is 0 for masked rows; None means that every row counts once.

    `denominator` is what a mean divides by, 1 where there is nothing to divide, so that a loss
    without a valid row is a finite 0. A given number of 0 stays 0 where rows are valid: on a device, where that cannot be
    refused without a host sync, the loss is infinite.
    """

    weight: Tensor | None
    denominator: Tensor


def row_weights(
    rows: int,
    counted: Tensor | None,  # (N,) bool; None counts every row
    token_weight: Tensor | None,  # (N,)
    num_items: int | Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> RowWeights:
    """Weights and denominator: `num_items` if given, else the sum of token weights, else the number of rows."""
    weight = None
    if token_weight is not None:
        weight = per_row(token_weight, dtype)
        if counted is not None:
            weight = weight.masked_fill(~counted, 0.0)
    elif counted is not None:
        weight = counted.to(dtype)

    if isinstance(num_items, Tensor) and num_items.device == device:
        total = num_items.to(dtype)
    elif num_items is not None:
        # `full` is a kernel launch; copying a number from the host would be a sync.
        total = torch.full((), float(num_items), dtype=dtype, device=device)
    elif weight is not None:
        total = weight.sum()
    else:
        total = torch.full((), rows, dtype=dtype, device=device)
    empty = total == 0
    if num_items is not None:
        if values_can_be_read(total) and bool(empty) and rows and (weight is None or bool(weight.any())):
            count = rows if weight is None else int((weight != 0).sum())
            raise ValueError(
                f"num_items_in_batch is 0, but {count} row(s) count here; pass the number of counted rows of all "
                "micro-batches together"
            )
        if weight is not None:
            empty = empty & ~weight.any()
        elif rows:
            empty = torch.zeros_like(empty)
    return RowWeights(weight, total.masked_fill(empty, 1.0))


def per_row(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) in the dtype of the loss, and no tensor of inference_mode, which plain autograd refuses to keep."""
    values = values.reshape(-1).to(dtype)
    return values.clone() if values.is_inference() else values


def flat(tensor: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return tensor.reshape(-1, tensor.shape[-1])


def inverse_length(length: Tensor) -> Tensor:
    """1 / length, 0 for a vector too short to have a direction, NaN where its squares were too large for the dtype.

    Plain autograd can go through it: a short vector gets no gradient.
    """
    short = length < NORM_EPS
    length = length.masked_fill(length == torch.inf, torch.nan)
    return length.masked_fill(short, 1.0).reciprocal().masked_fill(short, 0.0)


def rows_in(chunk_bytes: int, columns: int, least: int = 1) -> int:
    """Rows of two float32 buffers with so many columns that fit in `chunk_bytes`, but `least` at least."""
    return max(least, chunk_bytes // (8 * columns))


def compact_rows(
    weight: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    vocabulary: int,
) -> Tensor | None:
    """The indices (M,) of the valid rows, or None when all are; this is the one host sync of a loss.

    The same transfer that brings the number of valid rows brings the number of labels out of range.
    """
    if weight is None:
        return None
    valid = weight != 0
    numbers = [valid.sum()]
    if labels is not None:
        numbers.append(labels_out_of_range(labels, valid, vocabulary).sum())
    valid_count, *bad = torch.stack(numbers).tolist()
    if bad and bad[0] and labels is not None:
        refuse_labels(labels, valid, vocabulary)
    if valid_count == weight.shape[0]:
        return None
    return torch.nonzero_static(valid, size=valid_count).squeeze(1)


def equal_chunk(total: int, most: int, step: int = 1) -> int:
    """Size of equal chunks of `total`, at most `most`: a small last one costs a GEMM as much as a large one.

    Sizes are multiples of `step`, to which GEMMs are cut on a device, where `most` is not below it.
    """
    if most < step:
        return max(1, min(total, most))
    most -= most % step
    return max(1, min(total, most, -(-math.ceil(total / math.ceil(max(total, 1) / most)) // step) * step))


def put_back(tensor: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """(rows, ...) the rows that `compact_rows` named back at their places, zeros elsewhere."""
    if index is None:
        return tensor
    return tensor.new_zeros((rows, *tensor.shape[1:])).index_copy_(0, index, tensor)


def zero_masked_rows(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """(R, D) with zeros in rows of weight 0: they may hold NaN, which a gradient of 0 would not stop."""
    return tensor if weight is None else tensor.masked_fill((weight == 0).unsqueeze(1), 0.0)


def ids_in_range(ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids with 0 for those out of range, and which these are: they are not read, and become a NaN of their row.

    On a device, and in a compiled graph, they are not checked, which would be a host sync.
    """
    outside = (ids < 0) | (ids >= vocabulary)
    return ids.masked_fill(outside, 0), outside


def labels_out_of_range(labels: Tensor, valid: Tensor, vocabulary: int) -> Tensor:
    """(N,) bool: labels of valid rows that are no index into the vocabulary."""
    return valid & ((labels < 0) | (labels >= vocabulary))


def refuse_labels(labels: Tensor, valid: Tensor, vocabulary: int) -> None:
    """Raise the sentence about labels out of range, with the first offending value."""
    out_of_range = labels_out_of_range(labels, valid, vocabulary)
    if bool(out_of_range.any()):
        bad = labels[out_of_range]
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or equal to ignore_index, got {int(bad[0])} "
            f"(the first of {bad.numel()} invalid labels); check the vocabulary and the padding of the labels"
        )
