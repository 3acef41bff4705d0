"""Kernels over the features of a block: means of sequences, bands of inner products, and bands applied to rows.

Rows are read where they are: row r of a block (b, q, m, D) is its position r % m of sequence r // m. Masked rows
are never read. Products are of float32 numbers whatever the dtype of the features, as one side's mean may be
subtracted: in half precision the differences that are compared would be gone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import device_guard

# Rows, neighbours and columns of one tile of a matmul: an accumulator of 16 registers a thread.
BLOCK_ROWS, BLOCK_NEIGHBOURS, BLOCK_D = 64, 32, 32

# Triton 3.10 turns fused multiply-add off by default; these kernels are tested and counted with it. One stage: with the
# default of three, loads from computed places are held in registers ahead of their use, and applying a band spills.
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def row_offsets(rows, sequences, length, stride_b, stride_q, stride_m):
    """Where rows of the stream start, in elements."""
    rows = rows.to(tl.int64)  # rows x stride leaves int32
    sequence = rows // length
    return (sequence // sequences) * stride_b + (sequence % sequences) * stride_q + (rows % length) * stride_m


@triton.jit
def load_rows(
    features_ptr,  # (b, q, m, D)
    means_ptr,  # (b * q, D), read when CENTRED
    rows,  # (BLOCK,)
    counted,  # (BLOCK,) bool
    columns,  # (BLOCK_D,)
    D,
    sequences,
    length,
    stride_b,
    stride_q,
    stride_m,
    CENTRED: tl.constexpr,
):
    """A tile (BLOCK, BLOCK_D) of rows in fp32; 0 in masked rows and after the end of a row."""
    offsets = row_offsets(rows, sequences, length, stride_b, stride_q, stride_m)
    inside = counted[:, None] & (columns < D)[None, :]
    tile = tl.load(features_ptr + offsets[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        means = means_ptr + (rows // length).to(tl.int64)[:, None] * D + columns[None, :]
        tile -= tl.load(means, mask=inside, other=0.0)
    return tile


@triton.jit
def _sequence_means_kernel(
    features_ptr,  # (b, q, m, D)
    counted_ptr,  # (R,) bool
    means_ptr,  # (b * q, D) fp32, written
    D,
    sequences,
    length,
    stride_b,
    stride_q,
    stride_m,
    count,  # b * q
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a few sequences, so that short ones fill a tile as well, and a tile of their columns."""
    first = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    number = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, length, BLOCK_M):
        position = start + tl.arange(0, BLOCK_M)
        rows = first[:, None] * length + position[None, :]
        inside = (first < count)[:, None] & (position < length)[None, :]
        counted = tl.load(counted_ptr + rows, mask=inside, other=0) != 0
        tile = load_rows(
            features_ptr, means_ptr, tl.reshape(rows, (BLOCK_S * BLOCK_M,)),
            tl.reshape(counted, (BLOCK_S * BLOCK_M,)), columns, D, sequences, length, stride_b, stride_q,
            stride_m, False,
        )  # fmt: skip
        total += tl.sum(tl.reshape(tile, (BLOCK_S, BLOCK_M, BLOCK_D)), axis=1)
        number += tl.sum(counted.to(tl.float32), axis=1)
    means = total / tl.maximum(number, 1.0)[:, None]
    place = means_ptr + first.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(place, means, mask=(first < count)[:, None] & (columns < D)[None, :])


@triton.jit
def _band_products_kernel(
    features_ptr,  # (b, q, m, D)
    means_ptr,  # (b * q, D), read when CENTRED
    counted_ptr,  # (R,) bool
    band_ptr,  # (K + 1, R) fp32, written
    stride_band,
    R,
    K,
    D,
    sequences,
    length,
    stride_b,
    stride_q,
    stride_m,
    CENTRED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_NEIGHBOURS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a tile of rows and a tile of the rows from there on, up to K after the last."""
    first = tl.program_id(0) * BLOCK_ROWS
    rows = first + tl.arange(0, BLOCK_ROWS)
    others = first + tl.program_id(1) * BLOCK_NEIGHBOURS + tl.arange(0, BLOCK_NEIGHBOURS)
    counted = tl.load(counted_ptr + rows, mask=rows < R, other=0) != 0
    others_counted = tl.load(counted_ptr + others, mask=others < R, other=0) != 0
    total = tl.zeros((BLOCK_ROWS, BLOCK_NEIGHBOURS), tl.float32)
    lost = tl.zeros((BLOCK_ROWS, BLOCK_NEIGHBOURS), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        left = load_rows(
            features_ptr, means_ptr, rows, counted, columns, D, sequences, length, stride_b, stride_q,
            stride_m, CENTRED,
        )  # fmt: skip
        right = load_rows(
            features_ptr, means_ptr, others, others_counted, columns, D, sequences, length, stride_b,
            stride_q, stride_m, CENTRED,
        )  # fmt: skip
        # Compensated, as differences are taken of these sums: rounding does not grow with the width.
        part = tl.dot(left, tl.trans(right), input_precision="ieee") - lost
        grown = total + part
        lost = (grown - total) - part
        total = grown
    difference = others[None, :] - rows[:, None]
    inside = (difference >= 0) & (difference <= K) & (rows < R)[:, None]
    place = difference.to(tl.int64) * stride_band + rows[:, None]
    tl.store(band_ptr + place, total, mask=inside)


@triton.jit
def _band_apply_kernel(
    factors_ptr,  # (2 K + 1, R) fp32
    features_ptr,  # (b, q, m, D)
    means_ptr,  # (b * q, D), read when CENTRED
    counted_ptr,  # (R,) bool
    out_ptr,  # (b, q, m, D) fp32, added to
    stride_factors,
    R,
    K,
    D,
    sequences,
    length,
    stride_b,
    stride_q,
    stride_m,
    stride_out_b,
    stride_out_q,
    stride_out_m,
    CENTRED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_NEIGHBOURS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a tile of rows and a tile of their columns; all neighbours from K before to K after."""
    first = tl.program_id(0) * BLOCK_ROWS
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for start in range(first - K, first + BLOCK_ROWS + K, BLOCK_NEIGHBOURS):
        others = start + tl.arange(0, BLOCK_NEIGHBOURS)
        counted = tl.load(counted_ptr + others, mask=(others >= 0) & (others < R), other=0) != 0
        offset = others[None, :] - rows[:, None]
        inside = (offset >= -K) & (offset <= K) & (rows < R)[:, None] & counted[None, :]
        place = (offset + K).to(tl.int64) * stride_factors + rows[:, None]
        factors = tl.load(factors_ptr + place, mask=inside, other=0.0)
        right = load_rows(
            features_ptr, means_ptr, others, counted, columns, D, sequences, length, stride_b, stride_q,
            stride_m, CENTRED,
        )  # fmt: skip
        total = tl.dot(factors, right, total, input_precision="ieee")
    # Rows after the end of the stream are no places of `out`; the others are, valid or not.
    counted = tl.load(counted_ptr + rows, mask=rows < R, other=0) != 0
    offsets = row_offsets(rows, sequences, length, stride_out_b, stride_out_q, stride_out_m)
    place = out_ptr + offsets[:, None] + columns[None, :]
    inside = counted[:, None] & (columns < D)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


class Rows:
    """One side of a block; the contract is `features.contextual.backend.Rows`."""

    def __init__(
        self, features: Tensor, valid: Tensor | None, rows: int, margin: int, dtype: torch.dtype
    ) -> None:
        self.features, self.rows, self.dtype = features, rows, dtype
        if features.stride(3) != 1:
            self.features = features.contiguous()
        self.count = features[..., 0].numel()
        if valid is None:
            valid = torch.arange(rows, device=features.device) < self.count
        self.counted = valid
        self.means: Tensor | None = None

    def _arguments(self) -> dict[str, int | bool | Tensor]:
        """What every kernel here takes."""
        features = self.features
        return {
            "features_ptr": features,
            # A pointer that its flag leaves unread is given the features, so that one signature serves all.
            "means_ptr": features if self.means is None else self.means,
            "counted_ptr": self.counted,
            "D": features.shape[3],
            "sequences": features.shape[1],
            "length": features.shape[2],
            "stride_b": features.stride(0),
            "stride_q": features.stride(1),
            "stride_m": features.stride(2),
            "BLOCK_D": BLOCK_D,
            **OPTIONS,
        }

    def centre(self) -> None:
        """Subtract each sequence's mean on load from here on."""
        batch, sequences, length, width = self.features.shape
        count, block = batch * sequences, min(BLOCK_ROWS, triton.next_power_of_2(length))
        means = torch.empty(count, width, dtype=torch.float32, device=self.features.device)
        grid = (triton.cdiv(count, BLOCK_ROWS // block), triton.cdiv(width, BLOCK_D))
        with device_guard(means.device):
            _sequence_means_kernel[grid](
                count=count,
                BLOCK_S=BLOCK_ROWS // block,
                BLOCK_M=block,
                **self._arguments() | {"means_ptr": means},
            )
        self.means = means

    def products(self, out: Tensor) -> None:
        """out[d, i] = <x_i, x_{i + d}>."""
        width = out.shape[0] - 1
        grid = (triton.cdiv(self.rows, BLOCK_ROWS), triton.cdiv(BLOCK_ROWS + width, BLOCK_NEIGHBOURS))
        with device_guard(out.device):
            _band_products_kernel[grid](
                band_ptr=out,
                stride_band=out.stride(0),
                R=self.rows,
                K=width,
                CENTRED=self.means is not None,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_NEIGHBOURS=BLOCK_NEIGHBOURS,
                **self._arguments(),
            )

    def apply(self, factors: Tensor, out: Tensor) -> None:
        """out, shaped as the features, += sum over a of factors[a, i] * x_{i + a}."""
        grid = (triton.cdiv(self.rows, BLOCK_ROWS), triton.cdiv(self.features.shape[3], BLOCK_D))
        with device_guard(out.device):
            _band_apply_kernel[grid](
                factors_ptr=factors,
                out_ptr=out,
                stride_factors=factors.stride(0),
                R=self.rows,
                K=factors.shape[0] // 2,
                stride_out_b=out.stride(0),
                stride_out_q=out.stride(1),
                stride_out_m=out.stride(2),
                CENTRED=self.means is not None,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_NEIGHBOURS=BLOCK_NEIGHBOURS,
                **self._arguments(),
            )
