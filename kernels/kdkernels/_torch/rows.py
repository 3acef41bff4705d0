"""Row functions of the torch back end: blocks of rows, one after the other, in cache-sized scratch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import RowTerms
from .blocks import Block, Sums, accumulate, exponentiate, load, values, write_gradient

# Elements of one scratch buffer on the CPU: 8 rows of 32,000, 1 MiB. Two logit blocks and two such buffers are in use at
# a time and fit in the L2 caches of two cores; smaller blocks cost more in calls than they save. docs/log.md has figures.
BLOCK_ELEMENTS = 1 << 18

# The same on other devices, where blocks only bound the scratch: 64 MiB a buffer in float32.
DEVICE_BLOCK_ELEMENTS = 1 << 17

# Scratch buffers of a block: two exponentials, log ratio, products, two shifted logits, cross entropy.
SCRATCH = 7

# Row sums of exp(logits) between which the logits are used without subtracting their maximum: the
# logits that matter are then below 30 in size, and their float32 rounding no worse than log_softmax's.
LEAST_SUM, MOST_SUM = 1.0e-9, 1.0e13

# Rows of logits held at a time on the CPU: enough for the matrix products to run at full speed.
CHUNK_ROWS = 352

# Bytes of the two logit buffers of a chunk on other devices, and the fewest rows that feed the products.
CHUNK_BYTES = 1 << 30
LEAST_CHUNK_ROWS = 1024


def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None, device: torch.device) -> int:
    """How many rows of logits to hold at a time: by `chunk_bytes` when given, else by measured defaults."""
    if chunk_bytes is not None:
        return max(1, min(rows, chunk_bytes // (8 * vocabulary)))
    if device.type == "cpu":
        most = max(CHUNK_ROWS, BLOCK_ELEMENTS // vocabulary)
        return max(1, math.ceil(rows / math.ceil(rows / most)))  # equal chunks: a small last one is slow
    return max(1, min(rows, max(LEAST_CHUNK_ROWS, CHUNK_BYTES // (8 * vocabulary))))


def kd_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,) of every row; into `grad` its gradient times `row_weight`.

    The contract is `kdkernels.backends.Backend.kd_rows`. Computes in float64 for float64 inputs, else in float32.
    """
    rows, vocabulary = student_logits.shape
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    on_cpu = student_logits.device.type == "cpu"
    if labels is not None and terms.ce_weight == 0.0:
        labels = None

    dead = None  # rows of weight 0: whatever their logits hold, they give exact zeros
    if row_weight is not None:
        dead = row_weight.unsqueeze(1) == 0
        if on_cpu and not bool(dead.any()):
            dead = None
    if labels is not None:
        labels = labels.unsqueeze(1)
        if dead is not None:
            labels = labels.masked_fill(dead, 0)

    # What is small is taken for all rows at once, before and after the loop over blocks.
    size = max(1, min(rows, (BLOCK_ELEMENTS if on_cpu else DEVICE_BLOCK_ELEMENTS) // vocabulary))
    sums = student_logits.new_ones((len(Sums._fields), rows, 1), dtype=dtype)
    kd_factor = ce_factor = target = None
    if grad is not None:
        unit = sums[0].clone() if row_weight is None else row_weight.unsqueeze(1).to(dtype)
        kd_factor = unit * (terms.kd_scale / terms.temperature)
        ce_factor = None if labels is None else unit * terms.ce_weight
    if labels is not None:
        target = torch.empty_like(sums[0])
    sizes = [size] * (rows // size) + [rows % size] * (rows % size > 0) if rows else []
    parts = sums.split_with_sizes(sizes, dim=1)
    by_row = (student_logits, teacher_logits, labels, grad, kd_factor, ce_factor, target, *sums.unbind())
    bias_s = None if student_bias is None else student_bias.to(dtype)
    bias_t = None if teacher_bias is None else teacher_bias.to(dtype)
    scratch = student_logits.new_empty((SCRATCH, size, vocabulary), dtype=dtype).unbind()
    # Taking maxima and masking infinities costs a third more passes, and few rows need it. On the CPU a
    # block is first tried without; elsewhere looking at the result would make the host wait for the device.
    careful = not on_cpu
    for part, block in zip(parts, zip(*(_cut(tensor, sizes) for tensor in by_row), strict=True), strict=True):
        arguments, block_sums = _Rows(*block[:7]), Sums(*block[7:])
        if part.shape[1] != size:
            scratch = tuple(buffer[: part.shape[1]] for buffer in scratch)
        if not _solve(arguments, block_sums, part, terms, bias_s, bias_t, scratch, careful):
            careful = True
            _solve(arguments, block_sums, part, terms, bias_s, bias_t, scratch, careful)

    divergences = values(terms.divergence, sums)
    cross_entropies = torch.zeros_like(divergences)
    if target is not None:
        total = Sums(*sums.unbind())
        cross_entropies = (total.exp_s if terms.temperature == 1.0 else total.exp_ce).log().sub_(target)
    if dead is not None:
        divergences.masked_fill_(dead, 0.0)
        cross_entropies.masked_fill_(dead, 0.0)
        if grad is not None:
            grad.masked_fill_(dead, 0.0)
    return divergences.squeeze(1), cross_entropies.squeeze(1)


def _cut(tensor: Any, sizes: list[int]) -> Any:
    """A tensor's blocks of rows, in one call as they are many; None for each block of None."""
    return [None] * len(sizes) if tensor is None else tensor.split_with_sizes(sizes)


class _Rows(NamedTuple):
    """The arguments of `kd_rows` for the rows of one block."""

    student: Tensor  # (R, V)
    teacher: Tensor  # (R, V)
    labels: Tensor | None  # (R, 1)
    grad: Tensor | None  # (R, V)
    kd_factor: Tensor | None  # (R, 1), given with grad
    ce_factor: Tensor | None  # (R, 1), given with grad and labels
    target: Tensor | None  # (R, 1), receives the label's logit as it went into the exponential


def _solve(
    rows: _Rows,
    sums: Sums,
    part: Tensor,  # (len(Sums), R, 1), the same sums in one tensor
    terms: RowTerms,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    scratch: tuple[Tensor, ...],  # SCRATCH times (R, V)
    careful: bool,
) -> bool:
    """Sums and gradient of one block; False, and no gradient, if it takes more care than was taken."""
    exp_s, exp_t, ratio, spare, scratch_s, scratch_t, exp_ce = scratch
    warm = terms.temperature != 1.0

    log_s = load(rows.student, bias_s, careful, scratch_s)
    log_t = load(rows.teacher, bias_t, careful, scratch_t)
    if rows.labels is not None and rows.target is not None:
        torch.gather(log_s, 1, rows.labels, out=rows.target)
        if warm:
            exponentiate(log_s, exp_ce, sums.exp_ce)
    if warm:
        log_s = torch.mul(log_s, 1.0 / terms.temperature, out=scratch_s)
        log_t = torch.mul(log_t, 1.0 / terms.temperature, out=scratch_t)
    block = Block(log_s, log_t, exp_s, exp_t, ratio, spare, sums, careful)
    accumulate(block, terms.divergence)
    if not careful:
        # One look at all sums; those that are not taken yet hold 1, which is in range.
        totals = part.flatten().tolist()
        exponentials = totals[: 3 * part.shape[1]]
        in_range = min(exponentials) > LEAST_SUM and max(exponentials) < MOST_SUM
        if not (in_range and math.isfinite(sum(totals))):
            return False
    if rows.grad is None or rows.kd_factor is None:
        return True

    in_place = rows.grad.dtype == exp_s.dtype
    out = rows.grad if in_place else exp_t
    write_gradient(block, terms.divergence, rows.kd_factor, None if warm else rows.ce_factor, out)
    if rows.labels is not None and rows.ce_factor is not None:
        if warm:
            out.addcmul_(exp_ce, rows.ce_factor / sums.exp_ce)
        out.scatter_add_(1, rows.labels, -rows.ce_factor)
    if not in_place:
        rows.grad.copy_(out)
    return True


def mse_rows(
    prediction: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    write_grad: bool = True,
) -> Tensor:
    """Sums of squared differences (R,); `prediction` becomes 2 * (prediction - target) * row_weight * scale.

    The contract is `kdkernels.backends.Backend.mse_rows`.
    """
    if bias is not None:
        prediction.add_(bias)
    prediction.sub_(target)
    if row_weight is not None:
        prediction.masked_fill_(row_weight.unsqueeze(1) == 0, 0.0)
    total = torch.linalg.vecdot(prediction, prediction)
    if write_grad:
        prediction.mul_(2.0 * scale)
        if row_weight is not None:
            prediction.mul_(row_weight.unsqueeze(1))
    return total
