"""Row functions of the torch back end: blocks of rows, one after the other, in cache-sized scratch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import RowTerms
from .blocks import Block, Sums, accumulate, exponentiate, load, values, write_gradient

# Elements of one scratch buffer on the CPU. Measured on two cores with 2 MiB of L2 cache each.
BLOCK_ELEMENTS = 1 << 16

# Scratch buffers of a block: two exponentials, log ratio, products, two shifted logits, cross entropy.
SCRATCH = 7

# Row sums of exp(logits) between which the logits are used without subtracting their maximum: the
# logits that matter are then below 30 in size, and their float32 rounding no worse than log_softmax's.
LEAST_SUM, MOST_SUM = 1.0e-9, 1.0e13

# Rows of logits held at a time on the CPU: enough for the matrix products to run at full speed.
CHUNK_ROWS = 256

# Bytes of the two logit buffers of a chunk on other devices, and the fewest rows that feed the products.
CHUNK_BYTES = 1 << 30
LEAST_CHUNK_ROWS = 1024


def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None, device: torch.device) -> int:
    """How many rows of logits to hold at a time: by `chunk_bytes` when given, else by measured defaults."""
    if chunk_bytes is not None:
        return max(1, min(rows, chunk_bytes // (8 * vocabulary)))
    if device.type == "cpu":
        return max(1, min(rows, max(CHUNK_ROWS, BLOCK_ELEMENTS // vocabulary)))
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
    unit = torch.ones_like(student_logits[:, :1], dtype=dtype)
    if row_weight is not None:
        unit = row_weight.unsqueeze(1).to(dtype)

    # What is small is taken for all rows at once, before and after the loop over blocks.
    size = max(1, min(rows, BLOCK_ELEMENTS // vocabulary)) if on_cpu else max(rows, 1)
    sums = student_logits.new_ones((len(Sums._fields), rows, 1), dtype=dtype)
    target = student_logits.new_zeros((rows, 1), dtype=dtype)
    blocks = _Blocks(
        student_logits.split(size),
        teacher_logits.split(size),
        _split(labels, size),
        _split(grad, size),
        (unit * (terms.kd_scale / terms.temperature)).split(size),
        _split(None if labels is None else unit * terms.ce_weight, size),
        target.split(size),
        [Sums(*part.unbind()) for part in sums.split(size, dim=1)],
    )
    bias_s = None if student_bias is None else student_bias.to(dtype)
    bias_t = None if teacher_bias is None else teacher_bias.to(dtype)
    scratch = student_logits.new_empty((SCRATCH, size, vocabulary), dtype=dtype).unbind()
    # Taking maxima and masking infinities costs a third more passes, and few rows need it. On the CPU a
    # block is first tried without; elsewhere looking at the result would make the host wait for the device.
    careful = not on_cpu
    for number in range(len(blocks.student) if rows else 0):
        if not _solve(blocks, number, terms, bias_s, bias_t, scratch, careful):
            careful = True
            _solve(blocks, number, terms, bias_s, bias_t, scratch, careful)

    total = Sums(*sums.unbind())
    divergences = values(terms.divergence, total)
    cross_entropies = torch.zeros_like(divergences)
    if labels is not None:
        cross_entropies = (total.exp_s if terms.temperature == 1.0 else total.exp_ce).log() - target
    if dead is not None:
        divergences.masked_fill_(dead, 0.0)
        cross_entropies.masked_fill_(dead, 0.0)
        if grad is not None:
            grad.masked_fill_(dead, 0.0)
    return divergences.squeeze(1), cross_entropies.squeeze(1)


def _split(tensor: Tensor | None, size: int) -> tuple[Tensor, ...] | None:
    return None if tensor is None else tensor.split(size)


class _Blocks(NamedTuple):
    """The arguments of `kd_rows` cut into blocks of rows."""

    student: tuple[Tensor, ...]  # (R, V)
    teacher: tuple[Tensor, ...]  # (R, V)
    labels: tuple[Tensor, ...] | None  # (R, 1)
    grad: tuple[Tensor, ...] | None  # (R, V)
    kd_factor: tuple[Tensor, ...]  # (R, 1)
    ce_factor: tuple[Tensor, ...] | None  # (R, 1)
    target: tuple[Tensor, ...]  # (R, 1) receives the logit of the label as it went into the exponential
    sums: list[Sums]


def _solve(
    blocks: _Blocks,
    number: int,
    terms: RowTerms,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    scratch: tuple[Tensor, ...],  # SCRATCH times (R, V), longer than the last block
    careful: bool,
) -> bool:
    """Sums and gradient of one block; False, and no gradient, if it takes more care than was taken."""
    student, sums = blocks.student[number], blocks.sums[number]
    count = student.shape[0]
    if count != scratch[0].shape[0]:
        scratch = tuple(buffer[:count] for buffer in scratch)
    exp_s, exp_t, ratio, spare, scratch_s, scratch_t, exp_ce = scratch
    labels = None if blocks.labels is None else blocks.labels[number]
    warm = terms.temperature != 1.0

    log_s = load(student, bias_s, careful, scratch_s)
    log_t = load(blocks.teacher[number], bias_t, careful, scratch_t)
    if labels is not None:
        torch.gather(log_s, 1, labels, out=blocks.target[number])
        if warm:
            exponentiate(log_s, exp_ce, sums.exp_ce)
    if warm:
        log_s = torch.mul(log_s, 1.0 / terms.temperature, out=scratch_s)
        log_t = torch.mul(log_t, 1.0 / terms.temperature, out=scratch_t)
    exponentiate(log_s, exp_s, sums.exp_s)
    exponentiate(log_t, exp_t, sums.exp_t)
    if not careful and not _in_range(sums.exp_s, sums.exp_t, sums.exp_ce):
        return False

    block = Block(log_s, log_t, exp_s, exp_t, ratio, spare, sums, careful)
    accumulate(block, terms.divergence)
    if not careful and not _finite(sums.cross_s, sums.cross_t):
        return False
    if blocks.grad is None:
        return True

    grad = blocks.grad[number]
    in_place = grad.dtype == exp_s.dtype
    out = grad if in_place else exp_t
    ce_factor = None if blocks.ce_factor is None else blocks.ce_factor[number]
    write_gradient(block, terms.divergence, blocks.kd_factor[number], None if warm else ce_factor, out)
    if labels is not None and ce_factor is not None:
        if warm:
            out.addcmul_(exp_ce, ce_factor / sums.exp_ce)
        out.scatter_add_(1, labels, -ce_factor)
    if not in_place:
        grad.copy_(out)
    return True


def _in_range(*sums: Tensor) -> bool:
    """Whether exponentials taken without a shift are exact enough; False for NaN."""
    return all(LEAST_SUM < total < MOST_SUM for part in sums for total in part.view(-1).tolist())


def _finite(*sums: Tensor) -> bool:
    return all(math.isfinite(total) for part in sums for total in part.view(-1).tolist())


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
