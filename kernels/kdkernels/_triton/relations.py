"""Relations of tokens to tokens without their maps: tiles of scores on chip, as in flash attention.

A map is N x N scores of one head of one sequence. The values need one pass over its tiles: running maxima and sums of both
sides, and the running sum of p_t times the log ratio. Their gradients, from the kept maxima and sums, one pass a side: the
rows of q against all k, and the rows of k against all q. With q = k the scores of a tile serve both directions, so that
one kernel does with three products a tile what two would do with six.

Units: scores and maxima in powers of 2, which is how exponentials are taken; divergences in nats.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import architecture_of, device_guard
from .numeric import LN_2, LOG2_E
from .relation_configs import padded, relation_config, widest_head

# A score that does not count: finite, since -inf - -inf is NaN, and below any score that does.
NOT_COUNTED = tl.constexpr(-1.0e30)

RELATION_GRADIENT_IN_FORWARD = False

# Rows of the statistics: maximum and 1 / sum of the student, of the teacher, and the divergence.
STATISTICS = 5


@triton.jit
def _load_rows(
    features_ptr,  # (B * N, D) at the first column of a head
    stride_row,
    first,  # row of the sequence's first token, int64
    tokens,  # (BLOCK,)
    valid,  # (BLOCK,) whether each counts; the others are not read
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK, BLOCK_D) features, 0 where nothing counts."""
    columns = tl.arange(0, BLOCK_D)
    inside = valid[:, None] if BLOCK_D == D else valid[:, None] & (columns < D)[None, :]
    rows = features_ptr + (first + tokens)[:, None] * stride_row
    return tl.load(rows + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    """left @ right in fp32, exact to fp32's digits for fp32. The interpreter would take bfloat16 for integers."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _counts(mask_ptr, first, tokens, N, HAS_MASK: tl.constexpr):
    """(BLOCK,) whether a token is in the sequence and counts."""
    inside = tokens < N
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + first + tokens, mask=inside, other=0) != 0)
    return inside


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
    row_counts = _counts(mask_ptr, first, rows, N, HAS_MASK)
    q_s = _load_rows(
        student_q_ptr + student_column, stride_student_q, first, rows, row_counts, D_S, BLOCK_D_S
    )
    q_t = _load_rows(
        teacher_q_ptr + teacher_column, stride_teacher_q, first, rows, row_counts, D_T, BLOCK_D_T
    )

    maximum_s = tl.full((BLOCK_M,), NOT_COUNTED, tl.float32)
    maximum_t = tl.full((BLOCK_M,), NOT_COUNTED, tl.float32)
    total_s = tl.zeros((BLOCK_M,), tl.float32)
    total_t = tl.zeros((BLOCK_M,), tl.float32)
    cross = tl.zeros((BLOCK_M,), tl.float32)  # sum of exp2(t - maximum_t) ((t - maximum_t) - (s - maximum_s))
    end = tl.minimum(N, (tile + 1) * BLOCK_M) if CAUSAL else N
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_counts = _counts(mask_ptr, first, columns, N, HAS_MASK)
        k_s = _load_rows(
            student_k_ptr + student_column, stride_student_k, first, columns, column_counts, D_S, BLOCK_D_S
        )
        k_t = _load_rows(
            teacher_k_ptr + teacher_column, stride_teacher_k, first, columns, column_counts, D_T, BLOCK_D_T
        )
        allowed = column_counts[None, :]
        if CAUSAL:
            allowed = allowed & (columns[None, :] <= rows[:, None])
        s = tl.where(allowed, _product(q_s, k_s.T, INTERPRETED) * student_scale, NOT_COUNTED)
        t = tl.where(allowed, _product(q_t, k_t.T, INTERPRETED) * teacher_scale, NOT_COUNTED)

        next_s = tl.maximum(maximum_s, tl.max(s, axis=1))
        next_t = tl.maximum(maximum_t, tl.max(t, axis=1))
        s -= next_s[:, None]
        t -= next_t[:, None]
        p_t = tl.exp2(t)
        rescale_t = tl.exp2(maximum_t - next_t)
        # What was summed had log ratios from the old maxima.
        moved = (maximum_t - next_t) - (maximum_s - next_s)
        cross = rescale_t * (cross + total_t * moved) + tl.sum(p_t * (t - s), axis=1)
        total_t = total_t * rescale_t + tl.sum(p_t, axis=1)
        total_s = total_s * tl.exp2(maximum_s - next_s) + tl.sum(tl.exp2(s), axis=1)
        maximum_s, maximum_t = next_s, next_t

    # Rows that do not count may have seen no key; their numbers are replaced.
    total_s = tl.where(row_counts, total_s, 1.0)
    total_t = tl.where(row_counts, total_t, 1.0)
    divergence = (cross / total_t + tl.log2(total_s / total_t)) * LN_2
    out = statistics_ptr + map_index * N + rows
    inside = rows < N
    tl.store(out, maximum_s, mask=inside)
    tl.store(out + statistic_size, 1.0 / total_s, mask=inside)
    tl.store(out + 2 * statistic_size, maximum_t, mask=inside)
    tl.store(out + 3 * statistic_size, 1.0 / total_t, mask=inside)
    tl.store(out + 4 * statistic_size, tl.where(row_counts, divergence, 0.0), mask=inside)


@triton.jit
def _load_statistics(statistics_ptr, statistic_size, tokens, valid):
    """Maximum and 1 / sum of the student and of the teacher, (BLOCK,) each; 0 where nothing counts."""
    return (
        tl.load(statistics_ptr + tokens, mask=valid, other=0.0),
        tl.load(statistics_ptr + statistic_size + tokens, mask=valid, other=0.0),
        tl.load(statistics_ptr + 2 * statistic_size + tokens, mask=valid, other=0.0),
        tl.load(statistics_ptr + 3 * statistic_size + tokens, mask=valid, other=0.0),
    )


@triton.jit
def _relation_gradient_kernel(
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
    row_counts = _counts(mask_ptr, first, rows, N, HAS_MASK)
    row_weight = tl.load(row_weight_ptr + first + rows, mask=row_counts, other=0.0)
    here_s = _load_rows(student_ptr + student_column, stride_student, first, rows, row_counts, D_S, BLOCK_D_S)
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
        here_t = _load_rows(
            teacher_ptr + teacher_column, stride_teacher, first, rows, row_counts, D_T, BLOCK_D_T
        )
        row_max_s, row_inverse_s, row_max_t, row_inverse_t = _load_statistics(
            maps, statistic_size, rows, row_counts
        )
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            column_counts = _counts(mask_ptr, first, columns, N, HAS_MASK)
            there_s = _load_rows(
                student_other_ptr + student_column,
                stride_student_other,
                first,
                columns,
                column_counts,
                D_S,
                BLOCK_D_S,
            )
            there_t = _load_rows(
                teacher_other_ptr + teacher_column,
                stride_teacher_other,
                first,
                columns,
                column_counts,
                D_T,
                BLOCK_D_T,
            )
            s = _product(here_s, there_s.T, INTERPRETED) * student_scale
            t = _product(here_t, there_t.T, INTERPRETED) * teacher_scale
            both = row_counts[:, None] & column_counts[None, :]
            scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # gradient of the scores
            if AS_QUERIES:
                part = tl.exp2(s - row_max_s[:, None]) * row_inverse_s[:, None]
                part -= tl.exp2(t - row_max_t[:, None]) * row_inverse_t[:, None]
                allowed = both & (columns[None, :] <= rows[:, None]) if CAUSAL else both
                scores += tl.where(allowed, part * row_weight[:, None], 0.0)
            if AS_KEYS:
                max_s, inverse_s, max_t, inverse_t = _load_statistics(
                    maps, statistic_size, columns, column_counts
                )
                weight = tl.load(row_weight_ptr + first + columns, mask=column_counts, other=0.0)
                part = tl.exp2(s - max_s[None, :]) * inverse_s[None, :]
                part -= tl.exp2(t - max_t[None, :]) * inverse_t[None, :]
                allowed = both & (rows[:, None] <= columns[None, :]) if CAUSAL else both
                scores += tl.where(allowed, part * weight[None, :], 0.0)
            gradient += _product(scores.to(there_s.dtype), there_s, INTERPRETED)

    gradient *= gradient_scale
    width = tl.arange(0, BLOCK_D_S)
    out = grad_ptr + student_column + (first + rows)[:, None] * stride_grad + width[None, :]
    inside = (rows < N)[:, None] & (width < D_S)[None, :]
    tl.store(out, gradient.to(grad_ptr.dtype.element_ty), mask=inside)


def _flat(features: Tensor) -> Tensor:
    """(B, N, D) as (B * N, D) with a contiguous last axis."""
    features = features.flatten(0, 1)
    return features if features.stride(1) == 1 else features.contiguous()


def relation_rows(
    student: tuple[Tensor, Tensor],  # (B, N, D_s) each
    teacher: tuple[Tensor, Tensor],  # (B, N, D_t) each
    mask: Tensor | None,  # (B, N) bool
    heads: tuple[int, int],
    causal: bool,
    *,
    row_weight: Tensor | None = None,  # (B, N)
    needs: tuple[bool, bool] = (False, False),
    statistics: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], Tensor]:
    """Sums over heads (B, N) of the rows' divergences, and the gradients of the student's queries and keys.

    The contract is `kdkernels.backends.Backend.relation_rows`. The statistics hold five numbers per token and pair of
    heads, the divergences among them. Gradients have the student's dtype, but for float16, where they are float32.
    """
    batch, length, _ = student[0].shape
    pairs, device = max(heads), student[0].device
    width_s, width_t = student[0].shape[2] // heads[0], teacher[0].shape[2] // heads[1]
    half = torch.float32 not in (student[0].dtype, teacher[0].dtype)
    for name, width in (("student", width_s), ("teacher", width_t)):
        if width > widest_head(half):
            kind = "half-precision" if half else "float32"
            raise ValueError(
                f"impl='triton' takes {kind} relation heads of at most {widest_head(half)} columns, got {width} for the "
                f"{name}; use more heads or impl='torch'"
            )
    if teacher[0].dtype == torch.float64:
        raise ValueError(
            "the triton back end computes in float32, got the teacher in float64; use impl='torch' there"
        )
    architecture = architecture_of(device)
    values_config, gradient_config = (
        relation_config(padded(max(width_s, width_t)), half, gradient, architecture)
        for gradient in (False, True)
    )
    q_s, k_s, q_t, k_t = (_flat(side) for side in (*student, *teacher))
    sizes = {
        "N": length,
        "P": pairs,
        "student_repeats": pairs // heads[0],
        "teacher_repeats": pairs // heads[1],
        "student_scale": LOG2_E.value / math.sqrt(width_s),
        "teacher_scale": LOG2_E.value / math.sqrt(width_t),
        "statistic_size": batch * pairs * length,
        "HAS_MASK": mask is not None,
        "CAUSAL": causal,
        "INTERPRETED": architecture == "interpreter",
        "D_S": width_s,
        "D_T": width_t,
        "BLOCK_D_S": padded(width_s),
        "BLOCK_D_T": padded(width_t),
        # Triton 3.10 turns fused multiply-add off by default; these kernels are tested and counted with it.
        "enable_fp_fusion": True,
    }
    tiles = [triton.cdiv(length, config.block_m) for config in (values_config, gradient_config)]
    # A pointer that its flag leaves unread is given the features, so that one signature serves all.
    flags = q_s if mask is None else mask.contiguous().view(torch.uint8)
    empty = batch * length == 0
    if statistics is None:
        statistics = torch.empty((STATISTICS, batch, pairs, length), dtype=torch.float32, device=q_s.device)
        if not empty:
            with device_guard(device):
                _relation_values_kernel[(tiles[0] * batch * pairs,)](
                    student_q_ptr=q_s,
                    student_k_ptr=k_s,
                    teacher_q_ptr=q_t,
                    teacher_k_ptr=k_t,
                    mask_ptr=flags,
                    statistics_ptr=statistics,
                    stride_student_q=q_s.stride(0),
                    stride_student_k=k_s.stride(0),
                    stride_teacher_q=q_t.stride(0),
                    stride_teacher_k=k_t.stride(0),
                    **values_config.options,
                    **sizes,
                )
    to_itself = student[1] is student[0]
    gradients: list[Tensor | None] = [None, None]
    for side, need in enumerate(needs):
        if not need:
            continue
        assert row_weight is not None
        here_s, there_s, here_t, there_t = (q_s, k_s, q_t, k_t) if side == 0 else (k_s, q_s, k_t, q_t)
        dtype = torch.float32 if here_s.dtype == torch.float16 else here_s.dtype
        gradient = torch.empty((batch * length, here_s.shape[1]), dtype=dtype, device=here_s.device)
        gradients[side] = gradient.unflatten(0, (batch, length))
        if empty:
            continue
        with device_guard(device):
            _relation_gradient_kernel[(tiles[1] * batch * heads[0],)](
                student_ptr=here_s,
                student_other_ptr=there_s,
                teacher_ptr=here_t,
                teacher_other_ptr=there_t,
                mask_ptr=flags,
                row_weight_ptr=row_weight.contiguous(),
                statistics_ptr=statistics,
                grad_ptr=gradient,
                stride_student=here_s.stride(0),
                stride_student_other=there_s.stride(0),
                stride_teacher=here_t.stride(0),
                stride_teacher_other=there_t.stride(0),
                stride_grad=gradient.stride(0),
                student_heads=heads[0],
                gradient_scale=1.0 / math.sqrt(width_s),
                AS_QUERIES=side == 0,
                AS_KEYS=side == 1 or to_itself,
                **gradient_config.options,
                **sizes,
            )
    return statistics[4].sum(1), (gradients[0], gradients[1]), statistics
