"""Row work on tiles of the vocabulary; the slots are those of `core/row_state.py`.

Tiles are worked on in blocks of rows like whole rows are, always with the maximum subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.labels import label_terms
from ..core.row_state import (
    CE_MAX,
    CE_SUM,
    LABEL,
    LOGIT_SUM,
    MEAN,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_LABEL,
    TEACHER_MAX,
    TEACHER_SUM,
    VALUE,
    Tile,
    finite_or_zero,
    rescale,
)
from ..core.transform import transformed_logits
from ..divergences import Decoupled
from ..options import RowTerms
from .arithmetic import Arithmetic
from .blocks import Block, Sums, subtract_target
from .divergences import arithmetic_of
from .sizes import block_rows, worker_count
from .threads import share_rows


class _Part(NamedTuple):
    """One block of rows of a tile, transformed, in scratch of its own."""

    student: Tensor  # (R, C)
    teacher: Tensor | None  # (R, C); None where the teacher shares no id of the tile
    state: Tensor  # (SLOTS, R)
    inside: Tensor | None  # (R, 1) True where the label is in this tile
    label: Tensor | None  # (R, 1) its column, 0 elsewhere
    rows: slice
    derivative: Tensor | None  # (R, C) of the softcap
    scratch: Tensor  # (6, R, C)


def _each_part(
    work: Callable[[_Part], None], tile: Tile, terms: RowTerms, state: Tensor, *, derivative: bool = False
) -> None:
    """work(part) for all blocks of rows of a tile."""
    rows, width = tile.student.shape
    workers = worker_count(rows, width, tile.student.device)

    def share(here: slice) -> None:
        for part in _parts(tile, terms, state, derivative, here, workers):
            work(part)

    share_rows(share, rows, workers)


def _parts(
    tile: Tile, terms: RowTerms, state: Tensor, derivative: bool, share: slice, workers: int
) -> Iterator[_Part]:
    """The blocks of the rows of a share, one after the other in the same scratch."""
    rows, width = share.stop - share.start, tile.student.shape[1]
    dtype = state.dtype
    student_bias, teacher_bias = (
        None if bias is None else bias.to(dtype) for bias in (tile.student_bias, tile.teacher_bias)
    )
    sizes = block_rows(rows, width, tile.student.device, workers)
    scratch = torch.empty((9, sizes[0] if sizes else 0, width), dtype=dtype, device=tile.student.device)
    capped = derivative and terms.student_transform.softcap is not None
    start = share.start
    for size in sizes:
        here = slice(start, start + size)
        start += size
        softcap = scratch[2, :size] if capped else None
        student = transformed_logits(
            tile.student[here], student_bias, terms.student_transform, scratch[0, :size], softcap
        )
        teacher = inside = label = None
        if tile.teacher is not None:
            teacher = transformed_logits(
                tile.teacher[here], teacher_bias, terms.teacher_transform, scratch[1, :size]
            )
        if tile.labels is not None:
            label = tile.labels[here].unsqueeze(1) - tile.offset
            inside = (label >= 0) & (label < width)
            label = label.masked_fill(~inside, 0)
        yield _Part(student, teacher, state[:, here], inside, label, here, softcap, scratch[3:, :size])


def _merge(
    state: Tensor, largest: int, total: int, logits: Tensor, temperature: float, scratch: Tensor
) -> None:
    """Take (R, C) logits into a running maximum and sum."""
    before = state[largest].clone()
    after = torch.maximum(before, logits.amax(1))
    shifted = torch.sub(logits, finite_or_zero(after).unsqueeze(1), out=scratch)
    terms = (shifted if temperature == 1.0 else shifted.div_(temperature)).exp_().sum(1)
    state[total] = rescale(state[total], before, after, temperature) + terms
    state[largest] = after


def _keep(state: Tensor, row_weight: Tensor | None, before: Tensor | None) -> None:
    """Rows of weight 0 stay as they were."""
    if row_weight is not None and before is not None:
        state.copy_(torch.where(row_weight == 0, before, state))


def _without_label(logits: Tensor, part: _Part, scratch: Tensor) -> Tensor:
    """A copy in which the label's column is masked out."""
    copy = scratch.copy_(logits)
    if part.label is not None and part.inside is not None:
        at_label = copy.gather(1, part.label)
        copy.scatter_(1, part.label, at_label.masked_fill(part.inside, -math.inf))
    return copy


def tile_statistics(tile: Tile, terms: RowTerms, state: Tensor) -> None:
    """Merge a tile into the normalisers; the contract is `core.backend.Backend.tile_statistics`."""
    before = None if tile.row_weight is None else state.clone()
    split = isinstance(terms.divergence, Decoupled)

    def work(part: _Part) -> None:
        if part.label is not None and part.inside is not None:
            outside = ~part.inside
            part.state[LABEL] += part.student.gather(1, part.label).masked_fill(outside, 0.0).squeeze(1)
            if split:
                at_label = torch.full_like(part.state[:1].t(), math.inf)
                if part.teacher is not None:
                    at_label = part.teacher.gather(1, part.label)
                part.state[TEACHER_LABEL] += at_label.masked_fill(outside, 0.0).squeeze(1)
            if terms.ce_weight != 0.0:
                _merge(part.state, CE_MAX, CE_SUM, part.student, 1.0, part.scratch[0])
                part.state[LOGIT_SUM] += part.student.sum(1)
        if part.teacher is not None:
            student, teacher = part.student, part.teacher
            if split:
                student = _without_label(student, part, part.scratch[1])
                teacher = _without_label(teacher, part, part.scratch[2])
            temperature, scratch = terms.temperature, part.scratch[0]
            _merge(part.state, STUDENT_MAX, STUDENT_SUM, student, temperature, scratch)
            _merge(part.state, TEACHER_MAX, TEACHER_SUM, teacher, temperature, scratch)

    _each_part(work, tile, terms, state)
    _keep(state, tile.row_weight, before)


def _normalise_(log_p: Tensor, state: Tensor, largest: int, total: int, temperature: float) -> Tensor:
    """Logits to log p (R, C), in place."""
    log_sum = state[total].log()
    log_sum = log_sum.masked_fill(log_sum == -math.inf, 0.0)
    log_p.sub_(finite_or_zero(state[largest]).unsqueeze(1))
    return (log_p if temperature == 1.0 else log_p.div_(temperature)).sub_(log_sum.unsqueeze(1))


def _block(part: _Part, terms: RowTerms) -> Block:
    """The part as a block of normalised logs; for Decoupled the label's column is masked out."""
    assert part.teacher is not None
    log_s, log_t, exp_s, exp_t, ratio, work = part.scratch.unbind()
    if isinstance(terms.divergence, Decoupled):
        _without_label(part.student, part, log_s)
        _without_label(part.teacher, part, log_t)
    else:
        log_s.copy_(part.student)
        log_t.copy_(part.teacher)
    _normalise_(log_s, part.state, STUDENT_MAX, STUDENT_SUM, terms.temperature)
    _normalise_(log_t, part.state, TEACHER_MAX, TEACHER_SUM, terms.temperature)
    sums = Sums(*log_s.new_ones((len(Sums._fields), log_s.shape[0], 1)).unbind())
    mean = part.state[MEAN].unsqueeze(1)
    return Block(log_s, log_t, exp_s, exp_t, ratio, work, sums, safe=True, mean=mean)


def _accumulate(arithmetic: Arithmetic, block: Block) -> None:
    """On a CPU first as if all logs were finite, since masking costs more than all else; then with care if they are not."""
    if block.log_s.device.type == "cpu":
        block.safe = False
        arithmetic.accumulate(block)
        sums = block.sums
        if math.isfinite((sums.first + sums.second + sums.third).sum().item()):
            return
        block.safe = True
    arithmetic.accumulate(block)


def tile_sums(tile: Tile, terms: RowTerms, state: Tensor) -> None:
    """Add a tile to VALUE and MEAN; the contract is `core.backend.Backend.tile_sums`."""
    before = None if tile.row_weight is None else state.clone()
    arithmetic = arithmetic_of(terms.divergence, state.dtype)

    def work(part: _Part) -> None:
        block = _block(part, terms)
        _accumulate(arithmetic, block)
        _add_value(arithmetic, block, part.state)
        part.state[MEAN] += arithmetic.mean(block.sums).squeeze(1)

    _each_part(work, tile, terms, state)
    _keep(state, tile.row_weight, before)


def _add_value(arithmetic: Arithmetic, block: Block, state: Tensor) -> None:
    """A tile's share of the value from its sums; of Decoupled without the label's, which is known from the normalisers."""
    sums = Sums(*(number.double() for number in block.sums))
    one = torch.ones_like(sums.first)
    sums = sums._replace(exp_s=one, exp_t=one, label_s=one, label_t=one, target=one - one, non_target=one)
    state[VALUE] += arithmetic.values(sums, block.sums).squeeze(1).to(state.dtype)


def tile_gradient(
    tile: Tile,
    terms: RowTerms,
    state: Tensor,
    *,
    vocabulary: int,
    grad: Tensor,
    decoupled: tuple[Tensor, Tensor] | None = None,
    add_value: bool = False,
) -> None:
    """The gradient of a tile; the contract is `core.backend.Backend.tile_gradient`."""
    before = None if tile.row_weight is None or not add_value else state.clone()
    arithmetic = arithmetic_of(terms.divergence, state.dtype)
    unit = torch.ones_like(state[0]) if tile.row_weight is None else tile.row_weight.to(state.dtype)
    unit = (unit * terms.student_transform.scale).unsqueeze(1)

    def work(part: _Part) -> None:
        weight = unit[part.rows]
        if part.teacher is None:
            out = part.scratch[1].zero_()
        else:
            block = _block(part, terms)
            out, factor = block.log_t, weight * (terms.kd_scale / terms.temperature)
            if decoupled is not None:
                _set_labels(block.sums, part.state, terms.temperature)
                block.sums.target.copy_(decoupled[0][part.rows].unsqueeze(1))
                block.sums.non_target.copy_(decoupled[1][part.rows].unsqueeze(1))
            _accumulate(arithmetic, block)
            if add_value:
                _add_value(arithmetic, block, part.state)
            if decoupled is not None:
                # Only now, as the logs are without the label's column already.
                block.labels, block.absent = part.label, None if part.inside is None else ~part.inside
            arithmetic.write_gradient(block, factor, None, out)
        if terms.ce_weight != 0.0 and part.label is not None and part.inside is not None:
            of_ce = weight * terms.ce_weight
            p = torch.sub(part.student, part.state[CE_MAX].unsqueeze(1), out=part.scratch[0]).exp_()
            out.addcmul_(p, of_ce / part.state[CE_SUM].unsqueeze(1))
            subtract_target(out, of_ce, part.label, terms.label_smoothing, vocabulary, part.inside)
        if part.derivative is not None:
            out.mul_(part.derivative)
        grad[part.rows] = out.masked_fill_(weight == 0, 0.0)

    _each_part(work, tile, terms, state, derivative=True)
    _keep(state, tile.row_weight, before)


def _set_labels(sums: Sums, state: Tensor, temperature: float) -> None:
    """The label's logs in the units of normalised logs, in which the others sum to 1, or to 0 where they have nothing."""
    label_s, total_s, label_t, total_t = label_terms(state, temperature)
    for field, others, label, total in (
        (sums.label_s, sums.exp_s, label_s, total_s),
        (sums.label_t, sums.exp_t, label_t, total_t),
    ):
        log_sum = total.log()
        field.copy_((label - log_sum.masked_fill(log_sum == -math.inf, 0.0)).unsqueeze(1))
        others.copy_((total != 0).unsqueeze(1))
