"""The values of relations: one pass over the tiles of both maps, with running maxima, sums and divergences.

The divergence is a sum of terms that are not negative: within a tile those of `kl_terms`, and between the tiles so far and
the next one the chain rule of KL. A difference of two log-sums would leave 1e-7 of a divergence of any size.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..kd.divergence import kl_terms
from ..launch import device_guard
from ..numeric import LN_2
from .launch import RelationConfig
from .tiles import NOT_COUNTED, counts, load_rows, product


@triton.jit
def _relation_values_kernel(
    student_q_ptr,  # (B * N, D_s)
    student_k_ptr,
    teacher_q_ptr,  # (B * N, D_t)
    teacher_k_ptr,
    mask_ptr,  # (B * N,) uint8, read when HAS_MASK
    statistics_ptr,  # (STATISTICS, B, P, N) fp32, written
    stride_student_q,
    stride_student_k,
    stride_teacher_q,
    stride_teacher_k,
    N,
    P,  # pairs of heads
    student_repeats,  # pairs of a student's head
    teacher_repeats,
    student_scale,  # log2(e) / sqrt(D_S)
    teacher_scale,
    statistic_size,  # B * P * N
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    D_S: tl.constexpr,  # columns of a head
    D_T: tl.constexpr,
    BLOCK_D_S: tl.constexpr,
    BLOCK_D_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one pair of heads."""
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    map_index = (tl.program_id(0) // tiles).to(tl.int64)
    pair = map_index % P
    first = map_index // P * N
    student_column = pair // student_repeats * D_S
    teacher_column = pair // teacher_repeats * D_T

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_counts = counts(mask_ptr, first, rows, N, HAS_MASK)
    q_s = load_rows(student_q_ptr + student_column, stride_student_q, first, rows, row_counts, D_S, BLOCK_D_S)
    q_t = load_rows(teacher_q_ptr + teacher_column, stride_teacher_q, first, rows, row_counts, D_T, BLOCK_D_T)

    # Before the first tile: a mass of 1 far below any score, which the first valid one replaces.
    maximum_s = tl.full((BLOCK_M,), NOT_COUNTED, tl.float32)
    maximum_t = tl.full((BLOCK_M,), NOT_COUNTED, tl.float32)
    total_s = tl.full((BLOCK_M,), 1.0, tl.float32)
    total_t = tl.full((BLOCK_M,), 1.0, tl.float32)
    divergence = tl.zeros((BLOCK_M,), tl.float32)  # KL of the distributions over the columns so far
    end = tl.minimum(N, (tile + 1) * BLOCK_M) if CAUSAL else N
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_counts = counts(mask_ptr, first, columns, N, HAS_MASK)
        k_s = load_rows(
            student_k_ptr + student_column, stride_student_k, first, columns, column_counts, D_S, BLOCK_D_S
        )
        k_t = load_rows(
            teacher_k_ptr + teacher_column, stride_teacher_k, first, columns, column_counts, D_T, BLOCK_D_T
        )
        allowed = column_counts[None, :]
        if CAUSAL:
            allowed = allowed & (columns[None, :] <= rows[:, None])
        s = tl.where(allowed, product(q_s, k_s.T, INTERPRETED) * student_scale, NOT_COUNTED)
        t = tl.where(allowed, product(q_t, k_t.T, INTERPRETED) * teacher_scale, NOT_COUNTED)

        tile_maximum_s, tile_maximum_t = tl.max(s, axis=1), tl.max(t, axis=1)
        s -= tile_maximum_s[:, None]
        t -= tile_maximum_t[:, None]
        p_s, p_t = tl.exp2(s), tl.exp2(t)
        tile_total_s, tile_total_t = tl.sum(p_s, axis=1), tl.sum(p_t, axis=1)
        tile_log = tl.log2(tile_total_s / tile_total_t)
        terms, _ = kl_terms(
            p_t * (1.0 / tile_total_t)[:, None],
            p_s * (1.0 / tile_total_s)[:, None],
            ((s - t) - tile_log[:, None]) * LN_2,
        )
        tile_divergence = tl.sum(terms, axis=1)

        # The chain rule: of both parts their own divergence, by the teacher's share, and that of the shares.
        next_s, next_t = tl.maximum(maximum_s, tile_maximum_s), tl.maximum(maximum_t, tile_maximum_t)
        old_log = (maximum_s - next_s) - (maximum_t - next_t) + tl.log2(total_s / total_t)
        tile_log += (tile_maximum_s - next_s) - (tile_maximum_t - next_t)
        old_s, old_t = total_s * tl.exp2(maximum_s - next_s), total_t * tl.exp2(maximum_t - next_t)
        tile_total_s *= tl.exp2(tile_maximum_s - next_s)
        tile_total_t *= tl.exp2(tile_maximum_t - next_t)
        total_s, total_t = old_s + tile_total_s, old_t + tile_total_t
        log_total = tl.log2(total_s / total_t)
        old_share, tile_share = old_t / total_t, tile_total_t / total_t
        old_term, _ = kl_terms(old_share, old_s / total_s, (old_log - log_total) * LN_2)
        tile_term, _ = kl_terms(tile_share, tile_total_s / total_s, (tile_log - log_total) * LN_2)
        divergence = old_share * divergence + tile_share * tile_divergence + (old_term + tile_term)
        maximum_s, maximum_t = next_s, next_t

    # Masked rows may have seen no key; their numbers are replaced.
    total_s = tl.where(row_counts, total_s, 1.0)
    total_t = tl.where(row_counts, total_t, 1.0)
    out = statistics_ptr + map_index * N + rows
    inside = rows < N
    tl.store(out, maximum_s, mask=inside)
    out += statistic_size  # one step after the other: a product would leave int32
    tl.store(out, 1.0 / total_s, mask=inside)
    out += statistic_size
    tl.store(out, maximum_t, mask=inside)
    out += statistic_size
    tl.store(out, 1.0 / total_t, mask=inside)
    out += statistic_size
    tl.store(out, tl.where(row_counts, divergence, 0.0), mask=inside)


def relation_values(
    student: tuple[Tensor, Tensor],  # q and k, (B * N, D_s) each
    teacher: tuple[Tensor, Tensor],  # (B * N, D_t) each
    counted: Tensor,  # (B * N,) uint8, or anything when HAS_MASK is not set
    statistics: Tensor,  # (STATISTICS, B, P, N) fp32, written
    config: RelationConfig,
    sizes: dict[str, Any],  # the arguments that both kernels share
) -> None:
    """Fill the statistics of all rows of all maps."""
    _, batch, pairs, length = statistics.shape
    tiles = triton.cdiv(length, config.block_m)
    with device_guard(statistics.device):
        _relation_values_kernel[(tiles * batch * pairs,)](
            student_q_ptr=student[0],
            student_k_ptr=student[1],
            teacher_q_ptr=teacher[0],
            teacher_k_ptr=teacher[1],
            mask_ptr=counted,
            statistics_ptr=statistics,
            stride_student_q=student[0].stride(0),
            stride_student_k=student[1].stride(0),
            stride_teacher_q=teacher[0].stride(0),
            stride_teacher_k=teacher[1].stride(0),
            **config.options,
            **sizes,
        )
