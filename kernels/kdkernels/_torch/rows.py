"""Row functions of the torch back end: blocks of rows, one after the other, in cache-sized scratch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import RowTerms
from .blocks import Block, divergence_gradient, divergence_value, exponentiate, load

# Elements of one scratch buffer on the CPU. Measured on two cores with 2 MiB of L2 cache each.
BLOCK_ELEMENTS = 1 << 18

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
    divergences = student_logits.new_zeros((rows, 1), dtype=dtype)
    cross_entropies = student_logits.new_zeros((rows, 1), dtype=dtype)
    on_cpu = student_logits.device.type == "cpu"

    dead = None  # rows of weight 0: whatever their logits hold, they give exact zeros
    if row_weight is not None:
        dead = row_weight.unsqueeze(1) == 0
        if on_cpu and not bool(dead.any()):
            dead = None
    with_ce = labels is not None and terms.ce_weight != 0.0
    if with_ce and labels is not None:
        labels = labels.unsqueeze(1)
        if dead is not None:
            labels = labels.masked_fill(dead, 0)

    size = max(1, min(rows, BLOCK_ELEMENTS // vocabulary)) if on_cpu else max(rows, 1)
    scratch = student_logits.new_empty((SCRATCH, size, vocabulary), dtype=dtype)
    # Taking maxima and masking infinities costs a third more passes, and few rows need it. On the CPU a
    # block is first tried without; elsewhere looking at the result would make the host wait for the device.
    careful = not on_cpu
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        work = _Work(
            student_logits[here],
            teacher_logits[here],
            labels[here] if with_ce and labels is not None else None,
            terms,
            student_bias,
            teacher_bias,
            None if row_weight is None else row_weight[here].unsqueeze(1),
            None if grad is None else grad[here],
            scratch[:, : here.stop - start],
        )
        done = _solve(work, careful)
        if done is None:
            careful = True
            done = _solve(work, careful)
        assert done is not None
        divergences[here], ce = done
        if ce is not None:
            cross_entropies[here] = ce
        if grad is not None and dead is not None:
            grad[here].masked_fill_(dead[here], 0.0)
    if dead is not None:
        divergences.masked_fill_(dead, 0.0)
        cross_entropies.masked_fill_(dead, 0.0)
    return divergences.squeeze(1), cross_entropies.squeeze(1)


class _Work(NamedTuple):
    """One block: slices of the arguments of `kd_rows` and its scratch."""

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None  # (R, 1)
    terms: RowTerms
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    weight: Tensor | None  # (R, 1)
    grad: Tensor | None
    scratch: Tensor  # (SCRATCH, R, V)


def _solve(work: _Work, careful: bool) -> tuple[Tensor, Tensor | None] | None:
    """Divergence and cross entropy (R, 1), the gradient written; None if it takes more care than was taken."""
    exp_s, exp_t, ratio, spare, scratch_s, scratch_t, ce_exp = work.scratch.unbind()
    sum_s, sum_t, ce_sum = work.scratch.new_ones((3, exp_s.shape[0], 1)).unbind()
    terms, labels = work.terms, work.labels
    log_s = load(work.student_logits, work.student_bias, careful, scratch_s)
    log_t = load(work.teacher_logits, work.teacher_bias, careful, scratch_t)

    ce = None
    warm = terms.temperature != 1.0
    if labels is not None and warm:
        exponentiate(log_s, ce_exp, ce_sum)
        ce = ce_sum.log() - log_s.gather(1, labels)
    if warm:
        log_s = torch.mul(log_s, 1.0 / terms.temperature, out=scratch_s)
        log_t = torch.mul(log_t, 1.0 / terms.temperature, out=scratch_t)
    exponentiate(log_s, exp_s, sum_s)
    exponentiate(log_t, exp_t, sum_t)
    if labels is not None and not warm:
        ce = sum_s.log() - log_s.gather(1, labels)
    if not careful and not _in_range(sum_s, sum_t, ce_sum):
        return None

    block = Block(log_s, log_t, exp_s, exp_t, ratio, spare, sum_s, sum_t, careful)
    value, centre = divergence_value(block, terms.divergence)
    if not careful and not math.isfinite(value.sum().item()):
        return None
    if work.grad is None:
        return value, ce

    unit = torch.ones_like(sum_s) if work.weight is None else work.weight.to(sum_s.dtype)
    ce_factor = None if labels is None else unit * terms.ce_weight
    in_place = work.grad.dtype == exp_s.dtype
    out = work.grad if in_place else spare
    kd_factor = unit * (terms.kd_scale / terms.temperature)
    divergence_gradient(block, terms.divergence, centre, kd_factor, None if warm else ce_factor, out)
    if labels is not None and ce_factor is not None:
        if warm:
            out.addcmul_(ce_exp, ce_factor / ce_sum)
        out.scatter_add_(1, labels, -ce_factor)
    if not in_place:
        work.grad.copy_(out)
    return value, ce


def _in_range(*sums: Tensor) -> bool:
    """Whether exponentials taken without a shift are exact enough; False for NaN."""
    least, most = torch.stack(sums).aminmax()
    return least.item() > LEAST_SUM and most.item() < MOST_SUM


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
