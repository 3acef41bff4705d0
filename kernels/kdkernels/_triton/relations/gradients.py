"""The gradients of relations: tiles of both maps again, from the kept maxima and sums."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import device_guard
from .launch import RelationConfig
from .tiles import counts, load_rows, load_statistics, product


@triton.jit
def _relation_gradients_kernel(
    student_ptr,  # (B * N, D_s), the side whose gradient is written: q or k
    student_other_ptr,  # (B * N, D_s), the other of the two
    teacher_ptr,  # (B * N, D_t)
    teacher_other_ptr,
    mask_ptr,  # (B * N,) uint8, read when HAS_MASK
    row_weight_ptr,  # (B * N,) fp32, of the queries
    statistics_ptr,  # (STATISTICS, B, P, N) fp32, of the queries
    grad_ptr,  # (B * N, D_s), written
    stride_student,
    stride_student_other,
    stride_teacher,
    stride_teacher_other,
    stride_grad,
    N,
    P,
    student_heads,
    student_repeats,
    teacher_repeats,
    student_scale,  # log2(e) / sqrt(D_S)
    teacher_scale,
    gradient_scale,  # 1 / sqrt(D_S)
    statistic_size,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    AS_QUERIES: tl.constexpr,  # the side is q, and its rows are rows of the maps
    AS_KEYS: tl.constexpr,  # the side is k, and its rows are columns of the maps; both for relations to itself
    INTERPRETED: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BLOCK_D_S: tl.constexpr,
    BLOCK_D_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M tokens of one of the student's heads."""
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head_index = (tl.program_id(0) // tiles).to(tl.int64)
    head = head_index % student_heads
    sequence = head_index // student_heads
    first = sequence * N
    student_column = head * D_S

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_counts = counts(mask_ptr, first, rows, N, HAS_MASK)
    row_weight = tl.load(row_weight_ptr + first + rows, mask=row_counts, other=0.0)
    here_s = load_rows(student_ptr + student_column, stride_student, first, rows, row_counts, D_S, BLOCK_D_S)
    gradient = tl.zeros((BLOCK_M, BLOCK_D_S), tl.float32)

    begin, end = 0, N
    if CAUSAL and not AS_KEYS:
        end = tl.minimum(N, (tile + 1) * BLOCK_M)
    if CAUSAL and not AS_QUERIES:
        begin = tile * BLOCK_M // BLOCK_N * BLOCK_N
    for repeat in range(student_repeats):
        pair = head * student_repeats + repeat
        teacher_column = pair // teacher_repeats * D_T
        maps = statistics_ptr + (sequence * P + pair) * N
        here_t = load_rows(
            teacher_ptr + teacher_column, stride_teacher, first, rows, row_counts, D_T, BLOCK_D_T
        )
        row_max_s, row_inverse_s, row_max_t, row_inverse_t = load_statistics(
            maps, statistic_size, rows, row_counts
        )
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            column_counts = counts(mask_ptr, first, columns, N, HAS_MASK)
            there_s = load_rows(
                student_other_ptr + student_column,
                stride_student_other,
                first,
                columns,
                column_counts,
                D_S,
                BLOCK_D_S,
            )
            there_t = load_rows(
                teacher_other_ptr + teacher_column,
                stride_teacher_other,
                first,
                columns,
                column_counts,
                D_T,
                BLOCK_D_T,
            )
            s = product(here_s, there_s.T, INTERPRETED) * student_scale
            t = product(here_t, there_t.T, INTERPRETED) * teacher_scale
            both = row_counts[:, None] & column_counts[None, :]
            scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # gradient of the scores
            if AS_QUERIES:
                part = tl.exp2(s - row_max_s[:, None]) * row_inverse_s[:, None]
                part -= tl.exp2(t - row_max_t[:, None]) * row_inverse_t[:, None]
                allowed = both & (columns[None, :] <= rows[:, None]) if CAUSAL else both
                scores += tl.where(allowed, part * row_weight[:, None], 0.0)
            if AS_KEYS:
                max_s, inverse_s, max_t, inverse_t = load_statistics(
                    maps, statistic_size, columns, column_counts
                )
                weight = tl.load(row_weight_ptr + first + columns, mask=column_counts, other=0.0)
                part = tl.exp2(s - max_s[None, :]) * inverse_s[None, :]
                part -= tl.exp2(t - max_t[None, :]) * inverse_t[None, :]
                allowed = both & (rows[:, None] <= columns[None, :]) if CAUSAL else both
                scores += tl.where(allowed, part * weight[None, :], 0.0)
            gradient += product(scores.to(there_s.dtype), there_s, INTERPRETED)

    gradient *= gradient_scale
    width = tl.arange(0, BLOCK_D_S)
    out = grad_ptr + student_column + (first + rows)[:, None] * stride_grad + width[None, :]
    inside = (rows < N)[:, None] & (width < D_S)[None, :]
    tl.store(out, gradient.to(grad_ptr.dtype.element_ty), mask=inside)


def relation_gradients(
    student: tuple[Tensor, Tensor],  # the side asked for, q or k, and the other one, (B * N, D_s) each
    teacher: tuple[Tensor, Tensor],  # (B * N, D_t) each
    counted: Tensor,  # (B * N,) uint8, or anything when HAS_MASK is not set
    row_weight: Tensor,  # (B * N,) of the queries
    statistics: Tensor,  # (STATISTICS, B, P, N) fp32, of the queries
    config: RelationConfig,
    sizes: dict[str, Any],  # the arguments that both kernels share
    *,
    as_queries: bool,
    as_keys: bool,
) -> Tensor:
    """The gradient of one side, (B * N, D_s), in its dtype; float32 for float16."""
    here = student[0]
    heads = here.shape[1] // sizes["D_S"]
    _, batch, _, length = statistics.shape
    tiles = triton.cdiv(length, config.block_m)
    gradient = torch.empty(
        here.shape, dtype=torch.float32 if here.dtype == torch.float16 else here.dtype, device=here.device
    )
    if here.shape[0] == 0:
        return gradient
    with device_guard(here.device):
        _relation_gradients_kernel[(tiles * batch * heads,)](
            student_ptr=here,
            student_other_ptr=student[1],
            teacher_ptr=teacher[0],
            teacher_other_ptr=teacher[1],
            mask_ptr=counted,
            row_weight_ptr=row_weight,
            statistics_ptr=statistics,
            grad_ptr=gradient,
            stride_student=here.stride(0),
            stride_student_other=student[1].stride(0),
            stride_teacher=teacher[0].stride(0),
            stride_teacher_other=teacher[1].stride(0),
            stride_grad=gradient.stride(0),
            student_heads=heads,
            gradient_scale=1.0 / math.sqrt(sizes["D_S"]),
            AS_QUERIES=as_queries,
            AS_KEYS=as_keys,
            **config.options,
            **sizes,
        )
    return gradient
