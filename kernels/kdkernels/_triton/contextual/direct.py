"""Kernel for the angles of rows with a nearly equal neighbour, from differences of features instead of inner products."""

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.bands import DirectAngles
from ...options import NORM_EPS
from ..launch import device_guard
from ..numeric import inverse_length
from .products import OPTIONS, row_offsets

# Neighbours and columns of a tile. Two warps: with one it spills, and with four the compiler aims at 96 registers and misses.
BLOCK_NEIGHBOURS, BLOCK_D = 16, 32
DIRECT_OPTIONS = OPTIONS | {"num_warps": 2}


@triton.jit
def _differences(
    features_ptr,
    own,  # offset of the row
    offsets,  # (BLOCK_NEIGHBOURS,) of its neighbours
    counted,  # (BLOCK_NEIGHBOURS,) bool
    columns,
    D,
):
    """A tile (BLOCK_NEIGHBOURS, BLOCK_D) of neighbours minus their row, in fp32; 0 where there is none."""
    inside = columns < D
    row = tl.load(features_ptr + own + columns, mask=inside, other=0.0).to(tl.float32)
    tile = tl.load(
        features_ptr + offsets[:, None] + columns[None, :],
        mask=counted[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    return tl.where(counted[:, None] & inside[None, :], tile - row[None, :], 0.0)


@triton.jit
def _reciprocal_lengths(
    features_ptr, own, offsets, counted, D, shortest, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """1 / |f_j - f_i| of a tile of neighbours, see `inverse_length`."""
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        tile = _differences(features_ptr, own, offsets, counted, start + tl.arange(0, BLOCK_D), D)
        squares += tl.sum(tile * tile, axis=1)
    return inverse_length(squares, shortest)


@triton.jit
def _cosines(
    features_ptr, own, offsets_j, offsets_k, counted_j, counted_k, D, shortest,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines (BLOCK_N, BLOCK_N) between two tiles of neighbours, and the reciprocal lengths of both."""
    inverse_j = _reciprocal_lengths(features_ptr, own, offsets_j, counted_j, D, shortest, BLOCK_N, BLOCK_D)
    inverse_k = _reciprocal_lengths(features_ptr, own, offsets_k, counted_k, D, shortest, BLOCK_N, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        left = _differences(features_ptr, own, offsets_j, counted_j, columns, D) * inverse_j[:, None]
        right = _differences(features_ptr, own, offsets_k, counted_k, columns, D) * inverse_k[:, None]
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total, inverse_j, inverse_k


@triton.jit
def _direct_angles_kernel(
    student_ptr,  # (b, q, m, D_s)
    teacher_ptr,  # (b, q, m, D_t)
    chosen_ptr,  # (R,) bool
    valid_ptr,  # (V, R) bool
    row_scale_ptr,  # (R,) fp32
    values_ptr,  # (R,) fp32, written
    grad_ptr,  # (b, q, m, D_s) fp32, added to when WRITE_GRAD
    stride_valid,
    V,  # 2 W + 1
    D_s,
    D_t,
    sequences,
    length,
    stride_student_b,
    stride_student_q,
    stride_student_m,
    stride_teacher_b,
    stride_teacher_q,
    stride_teacher_m,
    stride_grad_b,
    stride_grad_q,
    stride_grad_m,
    shortest,
    WRITE_GRAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a row; pairs of tiles of its neighbours, each computed and not kept."""
    row = tl.program_id(0)
    if tl.load(chosen_ptr + row) == 0:
        tl.store(values_ptr + row, 0.0)
        return
    own_s = row_offsets(row, sequences, length, stride_student_b, stride_student_q, stride_student_m)
    own_t = row_offsets(row, sequences, length, stride_teacher_b, stride_teacher_q, stride_teacher_m)
    own_grad = row_offsets(row, sequences, length, stride_grad_b, stride_grad_q, stride_grad_m)
    scale = 4.0 * tl.load(row_scale_ptr + row)
    value = 0.0
    for first_j in range(0, V, BLOCK_N):
        j = first_j + tl.arange(0, BLOCK_N)
        counted_j = tl.load(valid_ptr + j.to(tl.int64) * stride_valid + row, mask=j < V, other=0) != 0
        rows_j = tl.where(counted_j, row + j - V // 2, row)
        student_j = row_offsets(
            rows_j, sequences, length, stride_student_b, stride_student_q, stride_student_m
        )
        teacher_j = row_offsets(
            rows_j, sequences, length, stride_teacher_b, stride_teacher_q, stride_teacher_m
        )
        for first_k in range(0, V, BLOCK_N):
            k = first_k + tl.arange(0, BLOCK_N)
            counted_k = tl.load(valid_ptr + k.to(tl.int64) * stride_valid + row, mask=k < V, other=0) != 0
            rows_k = tl.where(counted_k, row + k - V // 2, row)
            student_k = row_offsets(
                rows_k, sequences, length, stride_student_b, stride_student_q, stride_student_m
            )
            teacher_k = row_offsets(
                rows_k, sequences, length, stride_teacher_b, stride_teacher_q, stride_teacher_m
            )
            cosine, inverse_j, inverse_k = _cosines(
                student_ptr,
                own_s,
                student_j,
                student_k,
                counted_j,
                counted_k,
                D_s,
                shortest,
                BLOCK_N,
                BLOCK_D,
            )
            target, _, _ = _cosines(
                teacher_ptr,
                own_t,
                teacher_j,
                teacher_k,
                counted_j,
                counted_k,
                D_t,
                shortest,
                BLOCK_N,
                BLOCK_D,
            )
            error = cosine - target
            value += tl.sum(tl.sum(error * error, axis=1), axis=0)
            if WRITE_GRAD:
                # By unit difference j: the sum over k of error * unit k, less its part along unit j.
                along = tl.sum(error * cosine, axis=1)
                grad_j = row_offsets(rows_j, sequences, length, stride_grad_b, stride_grad_q, stride_grad_m)
                for start in range(0, D_s, BLOCK_D):
                    columns = start + tl.arange(0, BLOCK_D)
                    unit_j = _differences(student_ptr, own_s, student_j, counted_j, columns, D_s)
                    unit_k = _differences(student_ptr, own_s, student_k, counted_k, columns, D_s)
                    unit_j *= inverse_j[:, None]
                    unit_k *= inverse_k[:, None]
                    step = tl.dot(error, unit_k, input_precision="ieee") - along[:, None] * unit_j
                    step *= (scale * inverse_j)[:, None]
                    inside = columns < D_s
                    # Rows of other programs add here too, in any order.
                    tl.atomic_add(
                        grad_ptr + grad_j[:, None] + columns[None, :],
                        step,
                        mask=counted_j[:, None] & inside[None, :],
                    )
                    tl.atomic_add(grad_ptr + own_grad + columns, -tl.sum(step, axis=0), mask=inside)
    tl.store(values_ptr + row, value)


def _refuse_if_deterministic() -> None:
    """As torch does for its own operations that add in any order."""
    if torch.are_deterministic_algorithms_enabled():
        sentence = (
            "the gradient of contextual_relation_loss with angles adds the neighbours of nearly equal tokens in any order "
            "on the triton back end, and torch.use_deterministic_algorithms(True) is set; use impl='torch' or angle_weight=0"
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(sentence)
        warnings.warn(sentence, stacklevel=2)


def direct_rows(near: Tensor) -> Tensor:
    """Which rows `direct_angles` takes over: those marked."""
    return near


def direct_angles(block: DirectAngles, grad: Tensor | None) -> Tensor:
    """(R,) sums of squared differences of cosines of the chosen rows, 0 for the others."""
    student, teacher = (
        side if side.stride(3) == 1 else side.contiguous() for side in (block.student, block.teacher)
    )
    offsets, rows = block.valid.shape
    values = torch.empty(rows, dtype=torch.float32, device=student.device)
    if grad is not None:
        _refuse_if_deterministic()
    out = student if grad is None else grad  # unread without a gradient
    with device_guard(values.device):
        _direct_angles_kernel[(rows,)](
            student_ptr=student,
            teacher_ptr=teacher,
            chosen_ptr=block.rows,
            valid_ptr=block.valid,
            row_scale_ptr=block.row_scale,
            values_ptr=values,
            grad_ptr=out,
            stride_valid=block.valid.stride(0),
            V=offsets,
            D_s=student.shape[3],
            D_t=teacher.shape[3],
            sequences=student.shape[1],
            length=student.shape[2],
            stride_student_b=student.stride(0),
            stride_student_q=student.stride(1),
            stride_student_m=student.stride(2),
            stride_teacher_b=teacher.stride(0),
            stride_teacher_q=teacher.stride(1),
            stride_teacher_m=teacher.stride(2),
            stride_grad_b=out.stride(0),
            stride_grad_q=out.stride(1),
            stride_grad_m=out.stride(2),
            shortest=NORM_EPS,
            WRITE_GRAD=grad is not None,
            BLOCK_N=BLOCK_NEIGHBOURS,
            BLOCK_D=BLOCK_D,
            **DIRECT_OPTIONS,
        )
    return values
