"""Kernels over the angles of neighbours: values, and derivatives by lifts, scales and inner products.

A lane is a row of the stream and neighbours are walked in loops, so that loads are of neighbouring numbers and no two
programs write to one place. An angle is computed again wherever it is needed: reading it would cost more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.bands import AngleGradient, AngleSide
from ..launch import device_guard
from .products import OPTIONS

BLOCK = 128


@triton.jit
def _load_ends(student, teacher, place, inside):
    """Lift and scale of one neighbour on both sides, 0 outside."""
    _, student_lift_ptr, student_scale_ptr = student
    _, teacher_lift_ptr, teacher_scale_ptr = teacher
    return (
        (
            tl.load(student_lift_ptr + place, mask=inside, other=0.0),
            tl.load(student_scale_ptr + place, mask=inside, other=0.0),
        ),
        (
            tl.load(teacher_lift_ptr + place, mask=inside, other=0.0),
            tl.load(teacher_scale_ptr + place, mask=inside, other=0.0),
        ),
    )


@triton.jit
def _cosine(
    side,  # pointers to band (2 W + 1, W + R + W), lift and scale (2 W + 1, R)
    end,  # lift and scale (BLOCK,) of the neighbour j
    j,  # (BLOCK,) int32, all the same: places of the neighbours in the directed pairs
    k,
    rows,
    inside,
    stride_band,
    stride_pairs,
):
    """Cosine of the angle between neighbours j and k, and the scale of k; 0 outside."""
    band_ptr, lift_ptr, scale_ptr = side
    lift_j, scale_j = end
    place = k.to(tl.int64) * stride_pairs + rows
    scale_k = tl.load(scale_ptr + place, mask=inside, other=0.0)
    lift_k = tl.load(lift_ptr + place, mask=inside, other=0.0)
    # The band starts W columns before the first row: column rows + (j - W) + W.
    product = tl.load(
        band_ptr + tl.abs(k - j).to(tl.int64) * stride_band + rows + tl.minimum(j, k),
        mask=inside,
        other=0.0,
    )
    return (product + lift_j + lift_k) * scale_j * scale_k, scale_k


@triton.jit
def _cosines(student, teacher, ends, j, k, rows, inside, stride_band, stride_pairs):
    """`_cosine` of student and of teacher, and the student's scale of k."""
    cosine_s, scale_k = _cosine(student, ends[0], j, k, rows, inside, stride_band, stride_pairs)
    cosine_t, _ = _cosine(teacher, ends[1], j, k, rows, inside, stride_band, stride_pairs)
    return cosine_s, cosine_t, scale_k


@triton.jit
def _angle_values_kernel(
    student_band_ptr,  # (2 W + 1, W + R + W)
    student_lift_ptr,  # (2 W + 1, R)
    student_scale_ptr,  # (2 W + 1, R)
    teacher_band_ptr,
    teacher_lift_ptr,
    teacher_scale_ptr,
    values_ptr,  # (R,), written
    stride_band,
    stride_pairs,
    R,
    V,  # 2 W + 1
    BLOCK: tl.constexpr,
):
    """One program a block of rows."""
    student = (student_band_ptr, student_lift_ptr, student_scale_ptr)
    teacher = (teacher_band_ptr, teacher_lift_ptr, teacher_scale_ptr)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < R
    total = tl.zeros((BLOCK,), tl.float32)
    for place_j in range(0, V):
        j = tl.zeros((BLOCK,), tl.int32) + place_j
        ends = _load_ends(student, teacher, j.to(tl.int64) * stride_pairs + rows, inside)
        for place_k in range(place_j + 1, V):
            k = tl.zeros((BLOCK,), tl.int32) + place_k
            cosine_s, cosine_t, _ = _cosines(
                student, teacher, ends, j, k, rows, inside, stride_band, stride_pairs
            )
            error = cosine_s - cosine_t
            total += error * error
    tl.store(values_ptr + rows, 2.0 * total, mask=inside)


@triton.jit
def _angle_sides_kernel(
    student_band_ptr,
    student_lift_ptr,
    student_scale_ptr,
    teacher_band_ptr,
    teacher_lift_ptr,
    teacher_scale_ptr,
    lift_grad_ptr,  # (2 W + 1, R), written
    log_scale_grad_ptr,  # (2 W + 1, R), written
    stride_band,
    stride_pairs,
    R,
    V,
    BLOCK: tl.constexpr,
):
    """One program a block of rows and one neighbour j: sums over all others k."""
    student = (student_band_ptr, student_lift_ptr, student_scale_ptr)
    teacher = (teacher_band_ptr, teacher_lift_ptr, teacher_scale_ptr)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.zeros((BLOCK,), tl.int32) + tl.program_id(1)
    inside = rows < R
    place = j.to(tl.int64) * stride_pairs + rows
    ends = _load_ends(student, teacher, place, inside)
    lift_total = tl.zeros((BLOCK,), tl.float32)
    log_scale_total = tl.zeros((BLOCK,), tl.float32)
    for place_k in range(0, V):
        k = tl.zeros((BLOCK,), tl.int32) + place_k
        cosine_s, cosine_t, scale_k = _cosines(
            student, teacher, ends, j, k, rows, inside, stride_band, stride_pairs
        )
        # The angle of a neighbour with itself is 0 on both sides.
        error = tl.where(j == k, 0.0, cosine_s - cosine_t)
        lift_total += error * scale_k
        log_scale_total += error * cosine_s
    tl.store(lift_grad_ptr + place, 4.0 * lift_total * ends[0][1], mask=inside)
    tl.store(log_scale_grad_ptr + place, 4.0 * log_scale_total, mask=inside)


@triton.jit
def _angle_band_kernel(
    student_band_ptr,
    student_lift_ptr,
    student_scale_ptr,
    teacher_band_ptr,
    teacher_lift_ptr,
    teacher_scale_ptr,
    band_grad_ptr,  # (2 W + 1, R), written
    stride_band,
    stride_pairs,
    R,
    V,
    BLOCK: tl.constexpr,
):
    """One program a block of pairs (row, row + difference): sums over the rows that have both as neighbours j < k."""
    student = (student_band_ptr, student_lift_ptr, student_scale_ptr)
    teacher = (teacher_band_ptr, teacher_lift_ptr, teacher_scale_ptr)
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    difference = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    # The inner product of a row with itself is in no angle of two neighbours.
    last = tl.where(difference == 0, 0, V - difference)
    for place_j in range(0, last):
        j = tl.zeros((BLOCK,), tl.int32) + place_j
        k = j + difference
        rows = pairs - (j - V // 2)
        inside = (rows >= 0) & (rows < R)
        ends = _load_ends(student, teacher, j.to(tl.int64) * stride_pairs + rows, inside)
        cosine_s, cosine_t, scale_k = _cosines(
            student, teacher, ends, j, k, rows, inside, stride_band, stride_pairs
        )
        total += (cosine_s - cosine_t) * ends[0][1] * scale_k
    place = difference.to(tl.int64) * stride_pairs + pairs
    tl.store(band_grad_ptr + place, 4.0 * total, mask=pairs < R)


def _arguments(student: AngleSide, teacher: AngleSide) -> dict[str, int | bool | Tensor]:
    """What every kernel here takes; both sides have the same strides."""
    sides = {
        f"{name}_{part}_ptr": getattr(side, part)
        for name, side in (("student", student), ("teacher", teacher))
        for part in ("band", "lift", "scale")
    }
    return sides | {
        "stride_band": student.band.stride(0),
        "stride_pairs": student.lift.stride(0),
        "R": student.lift.shape[1],
        "V": student.lift.shape[0],
        "BLOCK": BLOCK,
        **OPTIONS,
    }


def angle_values(student: AngleSide, teacher: AngleSide) -> Tensor:
    """(R,) sums of squared differences of cosines, over ordered pairs of neighbours."""
    rows = student.lift.shape[1]
    values = torch.empty(rows, dtype=torch.float32, device=student.lift.device)
    with device_guard(values.device):
        _angle_values_kernel[(triton.cdiv(rows, BLOCK),)](values_ptr=values, **_arguments(student, teacher))
    return values


def angle_gradient(student: AngleSide, teacher: AngleSide) -> AngleGradient:
    """`angle_values`, and derivatives of their sum by the student's band, lifts and scales."""
    band, lift, log_scale = (torch.empty_like(student.lift) for _ in range(3))
    gradient = AngleGradient(band, lift, log_scale, angle_values(student, teacher))
    offsets, rows = student.lift.shape
    grid = (triton.cdiv(rows, BLOCK), offsets)
    with device_guard(student.lift.device):
        arguments = _arguments(student, teacher)
        _angle_sides_kernel[grid](
            lift_grad_ptr=gradient.lift, log_scale_grad_ptr=gradient.log_scale, **arguments
        )
        _angle_band_kernel[grid](band_grad_ptr=gradient.band, **arguments)
    return gradient
