"""One softmax at a time, for teachers that are a few numbers per token or none: statistics of a row, and multiples of its softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.matmul import accum_dtype
from .rows import MAX_EXP_SUM, MIN_EXP_SUM
from .sizes import block_rows, worker_count
from .threads import share_rows


def _exponentials(logits: Tensor, zero: Tensor | None, temperature: float, out: Tensor) -> Tensor:
    """out (R, V) = exp((logits - zero) / temperature) with (R,) zeros or none; out may be the logits."""
    if zero is not None:
        logits = torch.sub(logits, zero.unsqueeze(1), out=out)
    elif logits.dtype != out.dtype:
        logits = out.copy_(logits)  # else the exponential would be rounded to half
    if temperature != 1.0:
        logits = torch.mul(logits, 1.0 / temperature, out=out)
    return torch.exp(logits, out=out)


def row_statistics(
    logits: Tensor, *, temperature: float, at_one: bool, row_weight: Tensor | None = None
) -> Tensor:
    """(3, R) zero and log-sum-exps from it; the contract is `core.backend.Backend.row_statistics`."""
    rows, vocabulary = logits.shape
    statistics = torch.zeros((3, rows), dtype=accum_dtype(logits.dtype), device=logits.device)
    temperatures = [temperature, 1.0] if at_one and temperature != 1.0 else [temperature]
    workers = worker_count(rows, vocabulary, logits.device)

    def work(here: slice) -> None:
        own, own_statistics = logits[here], statistics[:, here]
        sizes = block_rows(own.shape[0], vocabulary, logits.device, workers)
        scratch = torch.empty(
            (sizes[0] if sizes else 0, vocabulary), dtype=statistics.dtype, device=logits.device
        )
        # As in `rows.py`: a block is first tried without its maxima, where looking at the result is no host sync.
        safe = logits.device.type != "cpu"
        for block, part in zip(
            own.split_with_sizes(sizes), own_statistics.split_with_sizes(sizes, 1), strict=True
        ):
            scratch, sums = scratch[: block.shape[0]], part[1 : 1 + len(temperatures)]
            if not safe:
                for out, temp in zip(sums, temperatures, strict=True):
                    torch.sum(_exponentials(block, None, temp, scratch), -1, out=out)
                least, most = torch.aminmax(sums)
                safe = not (float(least) > MIN_EXP_SUM and float(most) < MAX_EXP_SUM)  # also for NaN
                if not safe:
                    continue
            zero = part[0]
            torch.amax(block, -1, out=zero) if block.dtype == zero.dtype else zero.copy_(block.amax(-1))
            zero.masked_fill_(zero == -math.inf, 0.0)
            for out, temp in zip(sums, temperatures, strict=True):
                torch.sum(_exponentials(block, zero, temp, scratch), -1, out=out)

    share_rows(work, rows, workers)
    if len(temperatures) == 1:
        statistics[2] = statistics[1]
    statistics[1:].log_()
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
    """Multiples of two softmaxes into `grad`; the contract is `core.backend.Backend.softmax_gradient`."""
    rows, vocabulary = logits.shape
    zero = statistics[0]
    on_cpu = logits.device.type == "cpu"
    if on_cpu and not bool(zero.any()):
        zero = None
    # Normalisers are at least 1 where zero is the maximum, and in range where it is not: no factor overflows.
    of_first = (factor * (-statistics[1]).exp()).unsqueeze(1)
    of_second = None if factor_at_one is None else (factor_at_one * (-statistics[2]).exp()).unsqueeze(1)
    masked = factor == 0 if factor_at_one is None else (factor == 0) & (factor_at_one == 0)
    any_masked = not on_cpu or bool(masked.any())
    workers = worker_count(rows, vocabulary, logits.device)

    def work(share: slice) -> None:
        sizes = block_rows(share.stop - share.start, vocabulary, logits.device, workers)
        scratch = torch.empty(
            (2, sizes[0] if sizes else 0, vocabulary), dtype=statistics.dtype, device=logits.device
        )
        start = share.start
        for size in sizes:
            here = slice(start, start + size)
            start += size
            block, own_zero = logits[here], None if zero is None else zero[here]
            second = None
            if of_second is not None:
                second = _exponentials(block, own_zero, 1.0, scratch[1, :size])
            out = grad[here] if grad.dtype == scratch.dtype else scratch[0, :size]
            _exponentials(block, own_zero, temperature, out).mul_(of_first[here])
            if second is not None and of_second is not None:
                out.addcmul_(second, of_second[here])
            if constant is not None:
                out.add_(constant[here].unsqueeze(1))
            if any_masked:
                out.masked_fill_(masked[here].unsqueeze(1), 0.0)
            if out.dtype != grad.dtype:
                grad[here] = out

    share_rows(work, rows, workers)
