"""Relations of tokens to tokens without their maps: tiles of scores on chip, as in flash attention.

A map is N x N scores of one head of one sequence. The values (values.py) need one pass over its tiles: running
maxima and sums of both sides, and the running divergence. Their gradients (gradients.py), from
the kept maxima and sums, one pass a side: the rows of q against all k, and the rows of k against all q. With q = k the
scores of a tile serve both directions, so that one kernel does with three matmuls a tile what two would do with six.

Units: scores and maxima in powers of 2, which is how exponentials are taken; divergences in nats.
"""

import math

import torch
from torch import Tensor

from ..launch import architecture_of, refuse_float64
from ..numeric import LOG2_E
from .gradients import relation_gradients
from .launch import padded, relation_config, widest_head
from .tiles import STATISTICS
from .values import relation_values

RELATION_STATE = STATISTICS


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

    The contract is `core.backend.Backend.relation_rows`. The statistics hold five numbers per token and pair of
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
    refuse_float64(teacher_q=teacher[0])
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
    # A pointer that its flag leaves unread is given the features, so that one signature serves all.
    counted = q_s if mask is None else mask.contiguous().view(torch.uint8)
    if statistics is None:
        statistics = torch.empty((STATISTICS, batch, pairs, length), dtype=torch.float32, device=device)
        if statistics.numel():
            relation_values((q_s, k_s), (q_t, k_t), counted, statistics, values_config, sizes)
    to_itself = student[1] is student[0]
    sides = (((q_s, k_s), (q_t, k_t)), ((k_s, q_s), (k_t, q_t)))
    gradients: list[Tensor | None] = [None, None]
    for side, need in enumerate(needs):
        if need:
            assert row_weight is not None
            flat = relation_gradients(
                *sides[side],
                counted,
                row_weight.contiguous(),
                statistics,
                gradient_config,
                sizes,
                as_queries=side == 0,
                as_keys=side == 1 or to_itself,
            )
            gradients[side] = flat.unflatten(0, (batch, length))
    return statistics[4].sum(1), (gradients[0], gradients[1]), statistics
