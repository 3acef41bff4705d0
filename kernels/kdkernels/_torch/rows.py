"""Row functions of the torch back end: blocks of rows, one after the other, in cache-sized scratch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.labels import cross_entropy
from ..core.rows import ids_in_range
from ..core.transform import transformed_logits
from ..divergences import Decoupled
from ..options import RowTerms
from .blocks import CHECKED_SUMS, EXPONENTIAL_SUMS, Block, Sums, exponentiate, shift, subtract_target
from .divergences import arithmetic_of
from .sizes import block_rows, worker_count
from .threads import share_rows

# Row sums of exp(logits) between which the logits are used without subtracting their maximum: the
# logits that matter are then below 30 in size, and their float32 rounding no worse than log_softmax's.
MIN_EXP_SUM, MAX_EXP_SUM = 1.0e-9, 1.0e13


# Values and gradient come from the same exponentials here; nothing is kept for a gradient that comes later.
ROW_STATE = 0


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
    vocab_map: int | Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,) of every row; into `grad` its gradient times `row_weight`.

    The contract is `core.backend.Backend.kd_rows`. Computes in float64 for float64 inputs, else in float32.
    """
    rows, vocabulary = student_logits.shape
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    on_cpu = student_logits.device.type == "cpu"
    masked = None  # rows of weight 0: whatever their logits hold, they give exact zeros
    if row_weight is not None:
        masked = row_weight.unsqueeze(1) == 0
        if on_cpu and not bool(masked.any()):
            masked = None
    outside = None  # labels that are no ids of the student
    if labels is not None:
        labels = labels.unsqueeze(1)
        labels = labels if masked is None else labels.masked_fill(masked, 0)
        labels, outside = ids_in_range(labels, vocabulary)

    plan = _Plan.make(terms, vocabulary, labels, student_bias, teacher_bias, vocab_map, dtype)
    # What is small is taken for all rows at once, before and after the loop over blocks.
    sums = student_logits.new_ones((len(Sums._fields), rows, 1), dtype=dtype)
    fields = Sums(*sums.unbind())
    if decoupled is not None:
        for field, weight in ((fields.target, decoupled[0]), (fields.non_target, decoupled[1])):
            field.copy_(weight.unsqueeze(1))
            if outside is not None:
                field.masked_fill_(outside, math.nan)
    kd_factor = ce_factor = target = total = None
    if grad is not None:
        scale = terms.student_transform.scale
        unit = sums[0].clone() if row_weight is None else row_weight.unsqueeze(1).to(dtype)
        kd_factor = unit * (terms.kd_scale / terms.temperature * scale)
        if plan.cross_entropy and outside is not None:
            ce_factor = (unit * (terms.ce_weight * scale)).masked_fill_(outside, math.nan)
    if plan.cross_entropy:
        target, total = torch.empty_like(sums[0]), torch.empty_like(sums[0])
    by_row: Any = (
        sums, student_logits, teacher_logits, labels, grad, kd_factor, ce_factor, target, total, *fields
    )  # fmt: skip
    workers = worker_count(rows, vocabulary, student_logits.device)

    def solve(here: slice) -> None:
        own: Any = by_row if workers == 1 else [_rows_of(tensor, here) for tensor in by_row]
        sizes = block_rows(own[0].shape[1], vocabulary, student_logits.device, workers)
        blocks = (own,) if len(sizes) == 1 else zip(*(_cut(tensor, sizes) for tensor in own), strict=True)
        scratch = _Scratch.make(plan, sizes[0] if sizes else 0, student_logits, teacher_logits, grad, dtype)
        # Taking maxima and masking infinities costs a third more passes, and few rows need it. On the CPU a
        # block is first tried without; elsewhere looking at the result would be a host sync.
        safe = not on_cpu
        for part, *block in blocks:
            arguments, block_sums = _Rows(*block[:8]), Sums(*block[8:])
            if part.shape[1] != scratch.exp_s.shape[0]:
                scratch = scratch.first(part.shape[1])
            if not _solve(arguments, block_sums, part, plan, scratch, safe):
                safe = True
                _solve(arguments, block_sums, part, plan, scratch, safe)

    share_rows(solve, rows, workers)

    divergences = plan.arithmetic.values(Sums(*sums.double().unbind()), fields).to(dtype)
    cross_entropies = torch.zeros_like(divergences)
    if target is not None and total is not None:
        normaliser = fields.exp_ce if plan.separate else fields.exp_s
        smoothing = terms.label_smoothing
        mean = None if smoothing == 0.0 else total / vocabulary
        cross_entropies = cross_entropy(normaliser.log(), target, mean, smoothing)
        if outside is not None:
            cross_entropies.masked_fill_(outside, math.nan)
    for result in (divergences, cross_entropies, grad):
        if masked is not None and result is not None:
            result.masked_fill_(masked, 0.0)
    return divergences.squeeze(1), cross_entropies.squeeze(1)


def _rows_of(tensor: Tensor | None, here: slice) -> Tensor | None:
    return None if tensor is None else tensor[..., here, :]


def _cut(tensor: Any, sizes: list[int]) -> Any:
    """A tensor's blocks of rows, in one call as they are many; None for each block of None."""
    return [None] * len(sizes) if tensor is None else tensor.split_with_sizes(sizes, dim=-2)


@dataclass(frozen=True)
class _Plan:
    """What is the same for every block."""

    terms: RowTerms
    arithmetic: Any
    bias_s: Tensor | None
    bias_t: Tensor | None
    cross_entropy: bool
    separate: bool  # the cross entropy's softmax is another than the divergence's
    shared: int  # columns that the divergence runs over
    columns_s: Tensor | None  # (shared,) which columns, where they are not the first ones
    columns_t: Tensor | None
    position: Tensor | None  # (V,) place of a student's id among the shared ones, -1 without one

    @staticmethod
    def make(
        terms: RowTerms,
        vocabulary: int,
        labels: Tensor | None,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        vocab_map: int | Tensor | None,
        dtype: torch.dtype,
    ) -> _Plan:
        columns_s = columns_t = position = None
        shared = vocabulary if vocab_map is None else vocab_map
        if isinstance(vocab_map, Tensor):
            columns_s = torch.nonzero(vocab_map >= 0).squeeze(1)
            columns_t, shared = vocab_map[columns_s], columns_s.shape[0]
            position = torch.full_like(vocab_map, -1)
            position[columns_s] = torch.arange(shared, device=position.device)
        assert isinstance(shared, int)
        split = isinstance(terms.divergence, Decoupled)
        return _Plan(
            terms,
            arithmetic_of(terms.divergence, dtype),
            None if bias_s is None else bias_s.to(dtype),
            None if bias_t is None else bias_t.to(dtype),
            cross_entropy=labels is not None and terms.ce_weight != 0.0,
            separate=terms.temperature != 1.0 or vocab_map is not None or split,
            shared=shared,
            columns_s=columns_s,
            columns_t=columns_t,
            position=position,
        )


class _Scratch(NamedTuple):
    """Buffers of a block; those that a call does not use are empty."""

    exp_s: Tensor
    exp_t: Tensor
    ratio: Tensor
    work: Tensor
    log_s: Tensor
    log_t: Tensor
    exp_ce: Tensor
    chain: Tensor  # the softcap's part of the derivative
    shared_s: Tensor  # the shared columns, where they are not the first ones
    shared_t: Tensor
    result: Tensor  # the gradient, where it is not written in its own dtype

    @staticmethod
    def make(
        plan: _Plan,
        rows: int,
        student: Tensor,
        teacher: Tensor,
        grad: Tensor | None,
        dtype: torch.dtype,
    ) -> _Scratch:
        shared, mapped = plan.shared, plan.columns_s is not None
        whole = student.shape[1]
        widths = {
            "exp_s": shared,
            "exp_t": shared,
            "ratio": shared,
            "work": shared,
            "log_s": whole,
            "log_t": teacher.shape[1],
            "exp_ce": whole if plan.cross_entropy and plan.separate else 0,
            "chain": whole if grad is not None and plan.terms.student_transform.softcap is not None else 0,
            "shared_s": shared if mapped else 0,
            "shared_t": shared if mapped else 0,
            "result": whole if grad is not None and grad.dtype != dtype else 0,
        }
        memory = student.new_empty(rows * sum(widths.values()), dtype=dtype)
        pieces = memory.split_with_sizes([rows * width for width in widths.values()])
        return _Scratch(
            *(piece.view(rows, width) for piece, width in zip(pieces, widths.values(), strict=True))
        )

    def first(self, rows: int) -> _Scratch:
        """The same for a block of fewer rows."""
        return _Scratch(*(buffer[:rows] for buffer in self))


class _Rows(NamedTuple):
    """The arguments of `kd_rows` for the rows of one block."""

    student: Tensor  # (R, V)
    teacher: Tensor  # (R, V_t)
    labels: Tensor | None  # (R, 1)
    grad: Tensor | None  # (R, V)
    kd_factor: Tensor | None  # (R, 1), given with grad
    ce_factor: Tensor | None  # (R, 1), given with grad and a cross entropy
    target: Tensor | None  # (R, 1), receives the label's logit as it went into the exponential
    total: Tensor | None  # (R, 1), receives the sum of these logits


def _solve(rows: _Rows, sums: Sums, part: Tensor, plan: _Plan, scratch: _Scratch, safe: bool) -> bool:
    """Sums and gradient of one block; False, and no gradient, if it takes more care than was taken.

    `part` (len(Sums), R, 1) holds the same sums in one tensor.
    """
    terms = plan.terms
    log_s = transformed_logits(
        rows.student, plan.bias_s, terms.student_transform, scratch.log_s,
        scratch.chain if scratch.chain.shape[1] else None,
    )  # fmt: skip
    log_t = transformed_logits(rows.teacher, plan.bias_t, terms.teacher_transform, scratch.log_t)
    if safe:
        log_s, log_t = shift(log_s, scratch.log_s), shift(log_t, scratch.log_t)
    if plan.cross_entropy and rows.labels is not None and rows.target is not None and rows.total is not None:
        torch.gather(log_s, 1, rows.labels, out=rows.target)
        if terms.label_smoothing != 0.0:
            torch.sum(log_s, -1, keepdim=True, out=rows.total)
        if plan.separate:
            exponentiate(log_s, scratch.exp_ce, sums.exp_ce)

    block = _shared_block(rows, sums, plan, scratch, log_s, log_t, safe)
    plan.arithmetic.accumulate(block)
    if not safe and not in_range(part):
        return False
    if rows.grad is not None and rows.kd_factor is not None:
        _write_gradient(rows, rows.grad, rows.kd_factor, block, plan, scratch)
    return True


def in_range(part: Tensor) -> bool:
    """One look at all sums (len(Sums), R, 1); those that are not taken hold 1, which is in range."""
    totals = part[:CHECKED_SUMS].flatten().tolist()
    exponentials = totals[: EXPONENTIAL_SUMS * part.shape[1]]
    return min(exponentials) > MIN_EXP_SUM and max(exponentials) < MAX_EXP_SUM and math.isfinite(sum(totals))


def _shared_block(
    rows: _Rows, sums: Sums, plan: _Plan, scratch: _Scratch, log_s: Tensor, log_t: Tensor, safe: bool
) -> Block:
    """The columns of the divergence at its temperature."""
    labels, absent = rows.labels, None
    buffer_s, buffer_t = scratch.log_s, scratch.log_t
    if plan.columns_s is not None and plan.columns_t is not None and plan.position is not None:
        log_s = torch.index_select(log_s, 1, plan.columns_s, out=scratch.shared_s)
        log_t = torch.index_select(log_t, 1, plan.columns_t, out=scratch.shared_t)
        buffer_s, buffer_t = scratch.shared_s, scratch.shared_t
        if labels is not None:
            labels = plan.position[labels]
            absent = labels < 0
            labels = labels.clamp_min(0)
    elif log_s.shape[1] != plan.shared or log_t.shape[1] != plan.shared:
        log_s, log_t = log_s[:, : plan.shared], log_t[:, : plan.shared]
        buffer_s, buffer_t = buffer_s[:, : plan.shared], buffer_t[:, : plan.shared]
        if labels is not None:
            absent = labels >= plan.shared
            labels = labels.masked_fill(absent, 0)
    if safe and plan.shared != rows.student.shape[1]:
        log_s = shift(log_s, buffer_s)
    if safe and plan.shared != rows.teacher.shape[1]:
        log_t = shift(log_t, buffer_t)
    if plan.terms.temperature != 1.0:
        log_s = torch.mul(log_s, 1.0 / plan.terms.temperature, out=buffer_s)
        log_t = torch.mul(log_t, 1.0 / plan.terms.temperature, out=buffer_t)
    return Block(
        log_s,
        log_t,
        scratch.exp_s,
        scratch.exp_t,
        scratch.ratio,
        scratch.work,
        sums,
        safe,
        labels,
        absent,
    )


def _write_gradient(
    rows: _Rows, grad: Tensor, kd_factor: Tensor, block: Block, plan: _Plan, scratch: _Scratch
) -> None:
    """The gradient of divergence and cross entropy with respect to the logits as they came."""
    out = scratch.result if scratch.result.shape[1] else grad
    extra = None if plan.separate else rows.ce_factor
    if plan.columns_s is not None:
        plan.arithmetic.write_gradient(block, kd_factor, None, scratch.shared_s)
        out.zero_().index_copy_(1, plan.columns_s, scratch.shared_s)
    else:
        out[:, plan.shared :].zero_()
        plan.arithmetic.write_gradient(block, kd_factor, extra, out[:, : plan.shared])
    if rows.labels is not None and rows.ce_factor is not None:
        if plan.separate:
            out.addcmul_(scratch.exp_ce, rows.ce_factor / block.sums.exp_ce)
        subtract_target(out, rows.ce_factor, rows.labels, plan.terms.label_smoothing, out.shape[1])
    if scratch.chain.shape[1]:
        out.mul_(scratch.chain)
    if out is not grad:
        grad.copy_(out)
