"""One softmax at a time, for teachers that are a few numbers per token: statistics of a row, and multiples of its softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows import LEAST_SUM, MOST_SUM, block_rows


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _log_sum_exp(logits: Tensor, scale: float, scratch: Tensor, out: Tensor) -> None:
    """out (R,) = log sum exp(scale * logits)."""
    torch.mul(logits, scale, out=scratch)
    if logits.device.type == "cpu":
        torch.sum(torch.exp(scratch, out=scratch), -1, out=out)
        totals = out.tolist()
        if math.isfinite(sum(totals)) and min(totals) > LEAST_SUM and max(totals) < MOST_SUM:
            out.log_()
            return
        torch.mul(logits, scale, out=scratch)
    largest = scratch.amax(-1, keepdim=True)
    largest.masked_fill_(largest == -math.inf, 0.0)
    torch.sum(scratch.sub_(largest).exp_(), -1, out=out)
    out.log_().add_(largest.squeeze(1))


def row_statistics(
    logits: Tensor, *, temperature: float, at_one: bool, row_weight: Tensor | None = None
) -> Tensor:
    """(2, R) log-sum-exps; the contract is `kdkernels.backends.Backend.row_statistics`."""
    rows, vocabulary = logits.shape
    statistics = torch.zeros((2, rows), dtype=_wide(logits), device=logits.device)
    sizes = block_rows(rows, vocabulary, logits.device)
    scratch = torch.empty(
        (sizes[0] if sizes else 0, vocabulary), dtype=statistics.dtype, device=logits.device
    )
    for block, part in zip(
        logits.split_with_sizes(sizes), statistics.split_with_sizes(sizes, 1), strict=True
    ):
        room = scratch[: block.shape[0]]
        wide = block if block.dtype == statistics.dtype else block.to(statistics.dtype)
        _log_sum_exp(wide, 1.0 / temperature, room, part[0])
        if at_one and temperature != 1.0:
            _log_sum_exp(wide, 1.0, room, part[1])
        else:
            part[1].copy_(part[0])
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
    dtype = statistics.dtype
    sizes = block_rows(rows, vocabulary, logits.device)
    scratch = torch.empty((2, sizes[0] if sizes else 0, vocabulary), dtype=dtype, device=logits.device)
    dead = factor == 0 if factor_at_one is None else (factor == 0) & (factor_at_one == 0)
    start = 0
    for size in sizes:
        here = slice(start, start + size)
        start += size
        wide, first = logits[here], scratch[0, :size]
        torch.mul(wide, 1.0 / temperature, out=first).sub_(statistics[0, here].unsqueeze(1)).exp_()
        first.mul_(factor[here].unsqueeze(1))
        if factor_at_one is not None:
            second = torch.sub(wide, statistics[1, here].unsqueeze(1), out=scratch[1, :size]).exp_()
            first.addcmul_(second, factor_at_one[here].unsqueeze(1))
        if constant is not None:
            first.add_(constant[here].unsqueeze(1))
        if logits.device.type != "cpu" or bool(dead[here].any()):
            first.masked_fill_(dead[here].unsqueeze(1), 0.0)
        grad[here] = first
