"""One softmax at a time, for teachers that are a few numbers per token: statistics of a row, and multiples of its softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows import block_rows


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_statistics(
    logits: Tensor, *, temperature: float, at_one: bool, row_weight: Tensor | None = None
) -> Tensor:
    """(3, R) largest logit and log-sum-exps from it; the contract is `kdkernels.backends.Backend.row_statistics`."""
    rows, vocabulary = logits.shape
    statistics = torch.zeros((3, rows), dtype=_wide(logits), device=logits.device)
    sizes = block_rows(rows, vocabulary, logits.device)
    scratch = torch.empty(
        (sizes[0] if sizes else 0, vocabulary), dtype=statistics.dtype, device=logits.device
    )
    for block, part in zip(
        logits.split_with_sizes(sizes), statistics.split_with_sizes(sizes, 1), strict=True
    ):
        room = scratch[: block.shape[0]]
        zero = part[0]
        torch.amax(block, -1, out=zero) if block.dtype == zero.dtype else zero.copy_(block.amax(-1))
        zero.masked_fill_(zero == -math.inf, 0.0)
        for out, scale in ((part[1], 1.0 / temperature), (part[2], 1.0)):
            if out is part[2] and not (at_one and temperature != 1.0):
                out.copy_(part[1])
                break
            torch.sub(block, zero.unsqueeze(1), out=room)
            if scale != 1.0:
                room.mul_(scale)
            torch.sum(room.exp_(), -1, out=out)
            out.log_()
    return statistics if row_weight is None else statistics.masked_fill_(row_weight == 0, 0.0)


def softmax_gradient(
    logits: Tensor,
    statistics: Tensor,
    factor: Tensor,
    factor_at_one: Tensor | None,
    constant: Tensor | None,
    *,
    temperature: float,
    grad: Tensor,
) -> None:
    """Multiples of two softmaxes into `grad`; the contract is `kdkernels.backends.Backend.softmax_gradient`."""
    rows, vocabulary = logits.shape
    zero, log_sum, log_sum_at_one = statistics.unsqueeze(2).unbind()
    sizes = block_rows(rows, vocabulary, logits.device)
    scratch = torch.empty(
        (2, sizes[0] if sizes else 0, vocabulary), dtype=statistics.dtype, device=logits.device
    )
    dead = factor == 0 if factor_at_one is None else (factor == 0) & (factor_at_one == 0)
    start = 0
    for size in sizes:
        here = slice(start, start + size)
        start += size
        first, second = scratch[0, :size], scratch[1, :size]
        torch.sub(logits[here], zero[here], out=first)
        if factor_at_one is not None:
            torch.sub(first, log_sum_at_one[here], out=second).exp_()
        if temperature != 1.0:
            first.mul_(1.0 / temperature)
        first.sub_(log_sum[here]).exp_().mul_(factor[here].unsqueeze(1))
        if factor_at_one is not None:
            first.addcmul_(second, factor_at_one[here].unsqueeze(1))
        if constant is not None:
            first.add_(constant[here].unsqueeze(1))
        if logits.device.type != "cpu" or bool(dead[here].any()):
            first.masked_fill_(dead[here].unsqueeze(1), 0.0)
        grad[here] = first
