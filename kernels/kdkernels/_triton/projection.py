"""Row kernel of the projection MSE: squared differences of a row, and the gradient written over the prediction.

One pass: a read of prediction and target and one write, 12 bytes an element with fp32 on both sides, 8 with a half target and
a half gradient in the prediction's own memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aliasing import aliases_input
from .launch import RowConfig, architecture_of, device_guard, launch_options, refuse_float64, row_config
from .numeric import store_tile, write_zeros


@triton.jit
def _difference_step(
    total,  # (LANES,) sum of squares so far
    prediction_row,
    target_row,
    bias_ptr,
    grad_row,
    columns,
    factor,
    D,
    HAS_BIAS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    ALIASED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile: add its squares, write its gradient."""
    inside = columns < D if MASKED else None
    other = 0.0 if MASKED else None
    difference = tl.load(prediction_row + columns, mask=inside, other=other).to(tl.float32)
    if HAS_BIAS:
        difference += tl.load(bias_ptr + columns, mask=inside, other=other).to(tl.float32)
    difference -= tl.load(target_row + columns, mask=inside, other=other).to(tl.float32)
    if WRITE_GRAD:
        if ALIASED:
            # Tile i of the gradient overwrites the prediction's tile i // 2: all warps have read as far as i before one
            # writes, and the tiles ascend.
            tl.debug_barrier()
        store_tile(grad_row, columns, difference * factor, D, MASKED)
    return total + tl.sum(difference * difference, axis=1)


# Slices of numbers per row start anywhere.
@triton.jit(do_not_specialize_on_alignment=["row_weight_ptr", "squares_ptr"])
def _mse_rows_kernel(
    prediction_ptr,  # (R, D)
    target_ptr,  # (R, D)
    bias_ptr,  # (D,), read when HAS_BIAS
    row_weight_ptr,  # (R,) fp32, read when HAS_ROW_WEIGHT
    grad_ptr,  # (R, D), written when WRITE_GRAD
    squares_ptr,  # (R,) fp32, written
    stride_prediction_row,
    stride_target_row,
    stride_grad_row,
    D,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    ALIASED: tl.constexpr,  # grad holds narrower numbers in the prediction's own row
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    prediction_row = prediction_ptr + row * stride_prediction_row
    target_row = target_ptr + row * stride_target_row
    grad_row = grad_ptr + row * stride_grad_row
    full_blocks = D // BLOCK
    tail = full_blocks * BLOCK

    factor = 2.0
    if HAS_ROW_WEIGHT:
        weight = tl.load(row_weight_ptr + row)
        if weight == 0.0:  # nothing of the row is read: its numbers need not be valid
            tl.store(squares_ptr + row, 0.0)
            if WRITE_GRAD:
                write_zeros(grad_row, D, tile, BLOCK)
            return
        factor *= weight

    total = tl.zeros((LANES,), tl.float32)
    for block in range(full_blocks):
        columns = block * BLOCK + tile
        total = _difference_step(
            total,
            prediction_row,
            target_row,
            bias_ptr,
            grad_row,
            columns,
            factor,
            D,
            HAS_BIAS,
            WRITE_GRAD,
            ALIASED,
            False,
        )
    if tail < D:
        total = _difference_step(
            total,
            prediction_row,
            target_row,
            bias_ptr,
            grad_row,
            tail + tile,
            factor,
            D,
            HAS_BIAS,
            WRITE_GRAD,
            ALIASED,
            True,
        )
    tl.store(squares_ptr + row, tl.sum(total, axis=0))


def mse_rows(
    prediction: Tensor,  # (R, D)
    target: Tensor,  # (R, D)
    *,
    bias: Tensor | None = None,  # (D,)
    row_weight: Tensor | None = None,  # (R,)
    write_grad: bool = True,
    grad: Tensor | None = None,  # (R, D)
    config: RowConfig | None = None,
) -> Tensor:  # (R,) fp32
    """Sum of squared differences of every row; `grad` becomes 2 * (prediction - target) * row_weight.

    The contract is `core.backend.Backend.mse_rows`. `grad` is the prediction, or narrower numbers in the memory of its
    rows. fp16, bf16 or fp32 on either side, the last axis contiguous; computed in fp32 and rounded once to the dtype of
    `grad`. Rows of weight 0 are not read; their sum is 0 and their gradient is exactly 0. `config`
    replaces the table's configuration.
    """
    refuse_float64(prediction=prediction, target=target)
    rows, width = prediction.shape
    squares = torch.empty(rows, dtype=torch.float32, device=prediction.device)
    if rows == 0:
        return squares
    if config is None:
        config = row_config(architecture_of(prediction.device))
    grad = prediction if grad is None else grad
    with device_guard(prediction.device):
        _mse_rows_kernel[(rows,)](
            prediction_ptr=prediction,
            target_ptr=target,
            # A pointer that its flag leaves unread is given the prediction, so that one signature serves all.
            bias_ptr=prediction if bias is None else bias.contiguous(),
            row_weight_ptr=prediction if row_weight is None else row_weight.contiguous(),
            grad_ptr=grad,
            squares_ptr=squares,
            stride_prediction_row=prediction.stride(0),
            stride_target_row=target.stride(0),
            stride_grad_row=grad.stride(0),
            D=width,
            HAS_BIAS=bias is not None,
            HAS_ROW_WEIGHT=row_weight is not None,
            WRITE_GRAD=write_grad,
            ALIASED=aliases_input(grad, prediction),
            BLOCK=config.block,
            WIDTH=config.width,
            **launch_options(config, width, prediction.stride(0), target.stride(0), grad.stride(0)),
        )
    return squares
