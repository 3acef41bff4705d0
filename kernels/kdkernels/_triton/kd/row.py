"""Reading one tile of both rows: bias, scale, softcap, and which teacher column belongs to one of the student's."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..numeric import tanh


class LogitRow(NamedTuple):
    """One row of raw logits and what makes logits of them."""

    row_ptr: Any  # (V,)
    bias_ptr: Any  # (V,), read when its flag is set
    slope: Any  # scale, or scale / softcap
    softcap: Any  # 1 without a softcap


class Row(NamedTuple):
    """Both sides of a row, and the columns that they share."""

    student: LogitRow
    teacher: LogitRow
    # (V_s,) int32 teacher column of each of the student's columns, -1 for none; read for index maps
    map_ptr: Any
    V: Any  # columns of the student
    V_teacher: Any  # columns of the teacher
    shared: Any  # columns below which both sides are read without a mask: V, or the shared prefix
    label: Any  # int32 column, -1 without one


class Tile(NamedTuple):
    """One tile of both rows in fp32, (LANES, WIDTH) each."""

    student: Any  # in the divergence: -inf where the teacher has no such column
    teacher: Any
    student_full: Any  # all of the student's columns, -inf outside of the row


@triton.jit
def transformed(logits, side, TRANSFORM: tl.constexpr):
    """Logits after scale and softcap."""
    if TRANSFORM == "softcap":
        logits = side.softcap * tanh(logits * side.slope)
    elif TRANSFORM == "scale":
        logits = logits * side.slope
    return logits


@triton.jit
def chain_factor(logits, side, TRANSFORM: tl.constexpr):
    """d(logit)/d(raw logit), from the logit."""
    if TRANSFORM == "softcap":
        tangent = logits * (1.0 / side.softcap)
        factor = (side.slope * side.softcap) * (1.0 - tangent * tangent)
    else:
        factor = side.slope
    return factor


@triton.jit
def load_logits(side, columns, inside, HAS_BIAS: tl.constexpr, TRANSFORM: tl.constexpr):
    """Logits of some columns in fp32; -inf where `inside` is False. None: all are inside."""
    if inside is None:
        logits = tl.load(side.row_ptr + columns).to(tl.float32)
        if HAS_BIAS:
            logits += tl.load(side.bias_ptr + columns).to(tl.float32)
        logits = transformed(logits, side, TRANSFORM)
    else:
        logits = tl.load(side.row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            logits += tl.load(side.bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if TRANSFORM != "none":  # a softcap of -inf is finite
            logits = tl.where(inside, transformed(logits, side, TRANSFORM), float("-inf"))
    return logits


@triton.jit
def load_pair(row, columns, FLAGS: tl.constexpr, MASKED: tl.constexpr):
    """One tile of both rows; without MASKED all columns are below `row.shared`."""
    in_row = columns < row.V if MASKED else None
    student_full = load_logits(
        row.student, columns, in_row, FLAGS.has_student_bias, tl.constexpr(FLAGS.student_transform)
    )
    if FLAGS.vocab_map == "index":
        places = tl.load(row.map_ptr + columns, mask=in_row, other=-1 if MASKED else None)
        both = (places >= 0) & (places < row.V_teacher)
        teacher = load_logits(
            row.teacher, places, both, FLAGS.has_teacher_bias, tl.constexpr(FLAGS.teacher_transform)
        )
        # An id beyond the teacher's is not read, and makes the loss NaN: looking at it would be a host sync.
        teacher = tl.where(places >= row.V_teacher, float("nan"), teacher)
        student = tl.where(places >= 0, student_full, float("-inf"))
    elif FLAGS.vocab_map == "prefix" and MASKED:
        both = columns < row.shared
        teacher = load_logits(
            row.teacher, columns, both, FLAGS.has_teacher_bias, tl.constexpr(FLAGS.teacher_transform)
        )
        student = tl.where(both, student_full, float("-inf"))
    else:
        teacher = load_logits(
            row.teacher, columns, in_row, FLAGS.has_teacher_bias, tl.constexpr(FLAGS.teacher_transform)
        )
        student = student_full
    if FLAGS.divergence == "decoupled":  # its softmaxes are over what is not the label
        student = tl.where(columns == row.label, float("-inf"), student)
        teacher = tl.where(columns == row.label, float("-inf"), teacher)
    return Tile(student, teacher, student_full)
