"""Row functions of the torch back end: blocks of rows, one after the other, in cache-sized scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..options import RowTerms
from .blocks import Block, divergence_gradient, divergence_value, exponentiate, load

# Elements of one scratch buffer on the CPU. Measured on two cores with 2 MiB of L2 cache each.
BLOCK_ELEMENTS = 1 << 18

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

    size = max(1, min(rows, BLOCK_ELEMENTS // vocabulary)) if on_cpu else rows
    separate_ce = with_ce and terms.temperature != 1.0
    scratch = student_logits.new_empty((6 if separate_ce else 5, size, vocabulary), dtype=dtype)
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        count = here.stop - start
        weight = None if row_weight is None else row_weight[here].unsqueeze(1)
        arguments = (
            student_logits[here],
            teacher_logits[here],
            labels[here] if with_ce and labels is not None else None,
            terms,
            student_bias,
            teacher_bias,
            weight,
            None if grad is None else grad[here],
            scratch[:, :count],
        )
        # Infinite logits need a mask over the whole block. On the CPU it is cheaper to see whether the
        # value came out finite, elsewhere looking would make the host wait for the device.
        value, ce = _block(*arguments, guard=not on_cpu)
        divergences[here] = value
        if ce is not None:
            cross_entropies[here] = ce
        if grad is not None and dead is not None:
            grad[here].masked_fill_(dead[here], 0.0)
    if dead is not None:
        divergences.masked_fill_(dead, 0.0)
        cross_entropies.masked_fill_(dead, 0.0)
    return divergences.squeeze(1), cross_entropies.squeeze(1)


def _block(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,  # (R, 1)
    terms: RowTerms,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weight: Tensor | None,  # (R, 1)
    grad: Tensor | None,
    scratch: Tensor,  # (5 or 6, R, V)
    guard: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergence and cross entropy (R, 1) of one block; writes its gradient."""
    log_s, log_t, exp_s, exp_t, spare = scratch[:5].unbind()
    sum_s, sum_t = scratch.new_empty((2, log_s.shape[0], 1)).unbind()
    load(student_logits, student_bias, log_s)
    load(teacher_logits, teacher_bias, log_t)

    ce = ce_exp = ce_sum = None
    if labels is not None:
        target = log_s.gather(1, labels)
        if terms.temperature != 1.0:
            ce_exp, ce_sum = scratch[5], torch.empty_like(sum_s)
            exponentiate(log_s, ce_exp, ce_sum)
    if terms.temperature != 1.0:
        log_s.mul_(1.0 / terms.temperature)
        log_t.mul_(1.0 / terms.temperature)
    exponentiate(log_s, exp_s, sum_s)
    exponentiate(log_t, exp_t, sum_t)
    if labels is not None:
        ce = (sum_s if ce_sum is None else ce_sum).log().sub_(target)

    block = Block(log_s, log_t, exp_s, exp_t, spare, sum_s, sum_t, guard)
    value, centre = divergence_value(block, terms.divergence)
    if not guard and not math.isfinite(value.sum().item()):
        return _block(
            student_logits,
            teacher_logits,
            labels,
            terms,
            student_bias,
            teacher_bias,
            weight,
            grad,
            scratch,
            guard=True,
        )
    if grad is None:
        return value, ce

    unit = torch.ones_like(sum_s) if weight is None else weight.to(sum_s.dtype)
    ce_factor = unit * terms.ce_weight if labels is not None else None
    in_place = grad.dtype == log_s.dtype
    out = grad if in_place else spare
    divergence_gradient(
        block,
        terms.divergence,
        centre,
        unit * (terms.kd_scale / terms.temperature),
        ce_factor if ce_exp is None else None,
        out,
    )
    if labels is not None and ce_factor is not None:
        if ce_exp is not None and ce_sum is not None:
            out.addcmul_(ce_exp, ce_factor / ce_sum)
        out.scatter_add_(1, labels, -ce_factor)
    if not in_place:
        grad.copy_(out)
    return value, ce


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
