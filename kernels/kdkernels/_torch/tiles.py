"""Row work on tiles of the vocabulary; the slots are those of `core.row_state`.

Tiles are worked on in blocks of rows like whole rows are, always with the maximum subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import row_state
from ..core.labels import label_terms
from ..core.transform import transformed_logits
from ..divergences import Decoupled
from ..options import RowTerms
from .arithmetic import Arithmetic
from .blocks import Block, Sums, subtract_target
from .divergences import arithmetic_of
from .sizes import block_rows


class _Tile(NamedTuple):
    """One block of rows of a tile, transformed, in scratch of its own."""

    student: Tensor  # (R, C)
    teacher: Tensor | None  # (R, C); None where the teacher shares no id of the tile
    state: Tensor  # (SLOTS, R)
    inside: Tensor | None  # (R, 1) True where the label is in this tile
    label: Tensor | None  # (R, 1) its column, 0 elsewhere
    rows: slice
    chain: Tensor | None
    room: Tensor  # (6, R, C)


def _blocks(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    terms: RowTerms,
    state: Tensor,
    offset: int,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    derivative: bool = False,
) -> Iterator[_Tile]:
    rows, width = student.shape
    dtype = state.dtype
    student_bias, teacher_bias = (
        None if bias is None else bias.to(dtype) for bias in (student_bias, teacher_bias)
    )
    sizes = block_rows(rows, width, student.device)
    scratch = torch.empty((9, sizes[0] if sizes else 0, width), dtype=dtype, device=student.device)
    capped = derivative and terms.student_transform.softcap is not None
    start = 0
    for size in sizes:
        here = slice(start, start + size)
        start += size
        chain = scratch[2, :size] if capped else None
        own = transformed_logits(
            student[here], student_bias, terms.student_transform, scratch[0, :size], chain
        )
        its = None
        if teacher is not None:
            its = transformed_logits(teacher[here], teacher_bias, terms.teacher_transform, scratch[1, :size])
        inside = label = None
        if labels is not None:
            label = labels[here].unsqueeze(1) - offset
            inside = (label >= 0) & (label < width)
            label = label.masked_fill(~inside, 0)
        yield _Tile(own, its, state[:, here], inside, label, here, chain, scratch[3:, :size])


def _merge(state: Tensor, largest: int, total: int, logits: Tensor, temperature: float, room: Tensor) -> None:
    """Take (R, C) logits into a running maximum and sum."""
    before = state[largest].clone()
    after = torch.maximum(before, logits.amax(1))
    shifted = torch.sub(logits, row_state.finite_or_zero(after).unsqueeze(1), out=room)
    terms = (shifted if temperature == 1.0 else shifted.div_(temperature)).exp_().sum(1)
    state[total] = row_state.rescale(state[total], before, after, temperature) + terms
    state[largest] = after


def _keep(state: Tensor, row_weight: Tensor | None, before: Tensor | None) -> None:
    """Rows of weight 0 stay as they were."""
    if row_weight is not None and before is not None:
        state.copy_(torch.where(row_weight == 0, before, state))


def _without_label(logits: Tensor, tile: _Tile, room: Tensor) -> Tensor:
    """A copy in which the label's column is excluded."""
    copy = room.copy_(logits)
    if tile.label is not None and tile.inside is not None:
        own = copy.gather(1, tile.label)
        copy.scatter_(1, tile.label, own.masked_fill(tile.inside, -math.inf))
    return copy


def tile_statistics(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    terms: RowTerms,
    state: Tensor,
    *,
    offset: int,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> None:
    """Merge a tile into the normalisers; the contract is `kdkernels.backends.Backend.tile_statistics`."""
    before = None if row_weight is None else state.clone()
    split = isinstance(terms.divergence, Decoupled)
    blocks = _blocks(student, teacher, labels, terms, state, offset, student_bias, teacher_bias)
    for tile in blocks:
        if tile.label is not None and tile.inside is not None:
            own = tile.student.gather(1, tile.label).masked_fill(~tile.inside, 0.0).squeeze(1)
            tile.state[row_state.LABEL] += own
            if split:
                its = (
                    torch.full_like(own, math.inf)
                    if tile.teacher is None
                    else tile.teacher.gather(1, tile.label)
                )
                tile.state[row_state.TEACHER_LABEL] += its.reshape(-1).masked_fill(
                    ~tile.inside.squeeze(1), 0.0
                )
            if terms.ce_weight != 0.0:
                _merge(tile.state, row_state.CE_MAX, row_state.CE_SUM, tile.student, 1.0, tile.room[0])
                tile.state[row_state.LOGIT_SUM] += tile.student.sum(1)
        if tile.teacher is not None:
            pair = (tile.student, tile.teacher)
            if split:
                pair = (
                    _without_label(tile.student, tile, tile.room[1]),
                    _without_label(tile.teacher, tile, tile.room[2]),
                )
            heat, room = terms.temperature, tile.room[0]
            _merge(tile.state, row_state.STUDENT_MAX, row_state.STUDENT_SUM, pair[0], heat, room)
            _merge(tile.state, row_state.TEACHER_MAX, row_state.TEACHER_SUM, pair[1], heat, room)
    _keep(state, row_weight, before)


def _normalise_(log_p: Tensor, state: Tensor, largest: int, total: int, temperature: float) -> Tensor:
    """Logits to log p (R, C), in place."""
    log_sum = state[total].log()
    log_sum = log_sum.masked_fill(log_sum == -math.inf, 0.0)
    log_p.sub_(row_state.finite_or_zero(state[largest]).unsqueeze(1))
    return (log_p if temperature == 1.0 else log_p.div_(temperature)).sub_(log_sum.unsqueeze(1))


def _block(tile: _Tile, terms: RowTerms) -> Block:
    """The tile as a block of normalised logs; for Decoupled the label's column is excluded."""
    assert tile.teacher is not None
    log_s, log_t, exp_s, exp_t, ratio, spare = tile.room.unbind()
    if isinstance(terms.divergence, Decoupled):
        _without_label(tile.student, tile, log_s)
        _without_label(tile.teacher, tile, log_t)
    else:
        log_s.copy_(tile.student)
        log_t.copy_(tile.teacher)
    _normalise_(log_s, tile.state, row_state.STUDENT_MAX, row_state.STUDENT_SUM, terms.temperature)
    _normalise_(log_t, tile.state, row_state.TEACHER_MAX, row_state.TEACHER_SUM, terms.temperature)
    sums = Sums(*log_s.new_ones((len(Sums._fields), log_s.shape[0], 1)).unbind())
    mean = tile.state[row_state.MEAN].unsqueeze(1)
    return Block(log_s, log_t, exp_s, exp_t, ratio, spare, sums, careful=True, mean=mean)


def _accumulate(arithmetic: Arithmetic, block: Block) -> None:
    """On a CPU first as if all logs were finite, since masking costs more than all else; then with care if they are not."""
    if block.log_s.device.type == "cpu":
        block.careful = False
        arithmetic.accumulate(block)
        sums = block.sums
        if math.isfinite((sums.first + sums.second + sums.third).sum().item()):
            return
        block.careful = True
    arithmetic.accumulate(block)


def tile_sums(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    state: Tensor,
    *,
    offset: int,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> None:
    """Add a tile to VALUE and MEAN; the contract is `kdkernels.backends.Backend.tile_sums`."""
    before = None if row_weight is None else state.clone()
    arithmetic = arithmetic_of(terms.divergence, state.dtype)
    for tile in _blocks(student, teacher, labels, terms, state, offset, student_bias, teacher_bias):
        block = _block(tile, terms)
        _accumulate(arithmetic, block)
        _add_value(arithmetic, block, tile.state)
        tile.state[row_state.MEAN] += arithmetic.mean(block.sums).squeeze(1)
    _keep(state, row_weight, before)


def _add_value(arithmetic: Arithmetic, block: Block, state: Tensor) -> None:
    """A tile's part of the value from its sums; of Decoupled without the label's, which is known from the normalisers."""
    sums = Sums(*(number.double() for number in block.sums))
    one = torch.ones_like(sums.first)
    sums = sums._replace(exp_s=one, exp_t=one, label_s=one, label_t=one, target=one - one, non_target=one)
    state[row_state.VALUE] += arithmetic.values(sums, block.sums).squeeze(1).to(state.dtype)


def tile_gradient(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    terms: RowTerms,
    state: Tensor,
    *,
    offset: int,
    vocabulary: int,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
    grad: Tensor,
    add_value: bool = False,
) -> None:
    """The gradient of a tile; the contract is `kdkernels.backends.Backend.tile_gradient`."""
    before = None if row_weight is None or not add_value else state.clone()
    arithmetic = arithmetic_of(terms.divergence, state.dtype)
    unit = torch.ones_like(state[0]) if row_weight is None else row_weight.to(state.dtype)
    unit = (unit * terms.student_transform.scale).unsqueeze(1)
    blocks = _blocks(student, teacher, labels, terms, state, offset, student_bias, teacher_bias, True)
    for tile in blocks:
        weight = unit[tile.rows]
        if tile.teacher is None:
            out = tile.room[1].zero_()
        else:
            block = _block(tile, terms)
            out, factor = block.log_t, weight * (terms.kd_scale / terms.temperature)
            if decoupled is not None:
                _set_labels(block.sums, tile.state, terms.temperature)
                block.sums.target.copy_(decoupled[0][tile.rows].unsqueeze(1))
                block.sums.non_target.copy_(decoupled[1][tile.rows].unsqueeze(1))
            _accumulate(arithmetic, block)
            if add_value:
                _add_value(arithmetic, block, tile.state)
            if decoupled is not None:
                # Only now, as the logs are without the label's column already.
                block.labels, block.absent = tile.label, None if tile.inside is None else ~tile.inside
            arithmetic.write_gradient(block, factor, None, out)
        if terms.ce_weight != 0.0 and tile.label is not None and tile.inside is not None:
            of_ce = weight * terms.ce_weight
            p = torch.sub(tile.student, tile.state[row_state.CE_MAX].unsqueeze(1), out=tile.room[0]).exp_()
            out.addcmul_(p, of_ce / tile.state[row_state.CE_SUM].unsqueeze(1))
            subtract_target(out, of_ce, tile.label, terms.label_smoothing, vocabulary, tile.inside)
        if tile.chain is not None:
            out.mul_(tile.chain)
        grad[tile.rows] = out.masked_fill_(weight == 0, 0.0)
    _keep(state, row_weight, before)


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
