"""Row kernel of the losses that compare directions: both features of a row at length 1, their distance, both gradients.

Three passes over a row: lengths, distance, gradients. From device memory a row is read once: 2 x 16 KiB of it, at 4096
columns of fp32, stay in L1 and L2 for the passes after the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import NORM_EPS
from .aliasing import aliases_input
from .launch import RowConfig, architecture_of, device_guard, launch_options, refuse_float64, row_config
from .numeric import inverse_length, store_tile, write_zeros

SHORTEST = tl.constexpr(NORM_EPS)


@triton.jit
def _load_pair(rows, columns, D, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr):
    """Both sides of one tile in fp32, 0 outside the row."""
    prediction_row, target_row, bias_ptr = rows
    inside = columns < D if MASKED else None
    other = 0.0 if MASKED else None
    prediction = tl.load(prediction_row + columns, mask=inside, other=other).to(tl.float32)
    if HAS_BIAS:
        prediction += tl.load(bias_ptr + columns, mask=inside, other=other).to(tl.float32)
    return prediction, tl.load(target_row + columns, mask=inside, other=other).to(tl.float32)


@triton.jit
def _length_step(totals, rows, columns, D, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr):
    """Add the squares of one tile."""
    prediction, target = _load_pair(rows, columns, D, HAS_BIAS, MASKED)
    prediction_total, target_total = totals
    return (
        prediction_total + tl.sum(prediction * prediction, axis=1),
        target_total + tl.sum(target * target, axis=1),
    )


@triton.jit
def _distance_step(totals, rows, columns, inverses, D, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr):
    """Add |a - b|^2 and <a, a - b> of one tile."""
    prediction, target = _load_pair(rows, columns, D, HAS_BIAS, MASKED)
    unit = prediction * inverses[0]
    difference = unit - target * inverses[1]
    return totals[0] + tl.sum(difference * difference, axis=1), totals[1] + tl.sum(unit * difference, axis=1)


@triton.jit
def _gradient_step(
    rows,
    grad_row,
    grad_target_row,
    columns,
    inverses,
    along,  # <a, a - b> and <b, b - a>: the parts of the difference that only change a length
    factors,  # of the two gradients
    D,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD_TARGET: tl.constexpr,
    ALIASED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the gradients of one tile."""
    prediction, target = _load_pair(rows, columns, D, HAS_BIAS, MASKED)
    unit, target_unit = prediction * inverses[0], target * inverses[1]
    difference = unit - target_unit
    if ALIASED:
        # Tile i of the gradient overwrites the prediction's tile i // 2: all warps have read as far as i before one writes,
        # and the tiles ascend.
        tl.debug_barrier()
    store_tile(grad_row, columns, (difference - unit * along[0]) * factors[0], D, MASKED)
    if HAS_GRAD_TARGET:
        store_tile(grad_target_row, columns, -(difference + target_unit * along[1]) * factors[1], D, MASKED)


# Slices of numbers per row start anywhere.
@triton.jit(do_not_specialize_on_alignment=["row_weight_ptr", "values_ptr"])
def _direction_rows_kernel(
    prediction_ptr,  # (R, D)
    target_ptr,  # (R, D)
    bias_ptr,  # (D,), read when HAS_BIAS
    row_weight_ptr,  # (R,) fp32, read when HAS_ROW_WEIGHT
    grad_ptr,  # (R, D), written when WRITE_GRAD
    grad_target_ptr,  # (R, D), written when HAS_GRAD_TARGET
    values_ptr,  # (R,) fp32, written
    stride_prediction_row,
    stride_target_row,
    stride_grad_row,
    stride_grad_target_row,
    D,
    COSINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    HAS_GRAD_TARGET: tl.constexpr,
    ALIASED: tl.constexpr,  # grad holds narrower numbers in the prediction's own row
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    prediction_row = prediction_ptr + row * stride_prediction_row
    grad_row = grad_ptr + row * stride_grad_row
    grad_target_row = grad_target_ptr + row * stride_grad_target_row
    rows = (prediction_row, target_ptr + row * stride_target_row, bias_ptr)
    full_blocks = D // BLOCK
    tail = full_blocks * BLOCK

    factor = 1.0 if COSINE else 2.0
    if HAS_ROW_WEIGHT:
        weight = tl.load(row_weight_ptr + row)
        if weight == 0.0:  # nothing of the row is read: its numbers need not be valid
            tl.store(values_ptr + row, 0.0)
            if WRITE_GRAD:
                write_zeros(grad_row, D, tile, BLOCK)
                if HAS_GRAD_TARGET:
                    write_zeros(grad_target_row, D, tile, BLOCK)
            return
        factor *= weight

    totals = (tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32))
    for block in range(full_blocks):
        totals = _length_step(totals, rows, block * BLOCK + tile, D, HAS_BIAS, False)
    if tail < D:
        totals = _length_step(totals, rows, tail + tile, D, HAS_BIAS, True)
    inverse = inverse_length(tl.sum(totals[0], axis=0), SHORTEST)
    target_inverse = inverse_length(tl.sum(totals[1], axis=0), SHORTEST)
    inverses = (inverse, target_inverse)
    # The length after division: 0 without a direction.
    one = tl.where(inverse == 0.0, 0.0, 1.0)
    target_one = tl.where(target_inverse == 0.0, 0.0, 1.0)

    totals = (tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32))
    for block in range(full_blocks):
        totals = _distance_step(totals, rows, block * BLOCK + tile, inverses, D, HAS_BIAS, False)
    if tail < D:
        totals = _distance_step(totals, rows, tail + tile, inverses, D, HAS_BIAS, True)
    squares = tl.sum(totals[0], axis=0)
    # 1 - <a, b> from |a - b|^2, which keeps its digits where the two sides agree.
    tl.store(values_ptr + row, (squares + (2.0 - one - target_one)) * 0.5 if COSINE else squares)

    if WRITE_GRAD:
        # <a, a - b> by a product: what rounding did to the length of a is a multiple of a, and goes with this part.
        of_unit = tl.sum(totals[1], axis=0)
        along = (of_unit, squares - of_unit)
        # No angle, no gradient: with one side of length 0 it would be rounding.
        factor *= one * target_one
        factors = (factor * inverse, factor * target_inverse)
        for block in range(full_blocks):
            columns = block * BLOCK + tile
            _gradient_step(
                rows,
                grad_row,
                grad_target_row,
                columns,
                inverses,
                along,
                factors,
                D,
                HAS_BIAS,
                HAS_GRAD_TARGET,
                ALIASED,
                False,
            )
        if tail < D:
            columns = tail + tile
            _gradient_step(
                rows,
                grad_row,
                grad_target_row,
                columns,
                inverses,
                along,
                factors,
                D,
                HAS_BIAS,
                HAS_GRAD_TARGET,
                ALIASED,
                True,
            )


def direction_rows(
    prediction: Tensor,  # (R, D)
    target: Tensor,  # (R, D)
    *,
    cosine: bool,
    bias: Tensor | None = None,  # (D,)
    row_weight: Tensor | None = None,  # (R,)
    write_grad: bool = True,
    grad: Tensor | None = None,  # (R, D)
    grad_target: Tensor | None = None,  # (R, D)
    config: RowConfig | None = None,
) -> Tensor:  # (R,) fp32
    """1 - cosine or squared difference of the unit vectors of every row, and both gradients.

    fp16, bf16 or fp32 on either side, the last axis contiguous; computed in fp32. Rows of weight 0 are not read; their
    value is 0 and their gradients are exactly 0. `grad` is the prediction, or narrower numbers in the memory of its rows. `config` replaces the table's configuration.
    """
    refuse_float64(prediction=prediction, target=target)
    rows, width = prediction.shape
    distances = torch.empty(rows, dtype=torch.float32, device=prediction.device)
    if rows == 0:
        return distances
    if config is None:
        config = row_config(architecture_of(prediction.device))
    # A pointer that its flag leaves unread is given the prediction, so that one signature serves all.
    grad = prediction if grad is None else grad
    written = prediction if grad_target is None else grad_target
    with device_guard(prediction.device):
        _direction_rows_kernel[(rows,)](
            prediction_ptr=prediction,
            target_ptr=target,
            bias_ptr=prediction if bias is None else bias.contiguous(),
            row_weight_ptr=prediction if row_weight is None else row_weight.contiguous(),
            grad_ptr=grad,
            grad_target_ptr=written,
            values_ptr=distances,
            stride_prediction_row=prediction.stride(0),
            stride_target_row=target.stride(0),
            stride_grad_row=grad.stride(0),
            stride_grad_target_row=written.stride(0),
            D=width,
            COSINE=cosine,
            HAS_BIAS=bias is not None,
            HAS_ROW_WEIGHT=row_weight is not None,
            WRITE_GRAD=write_grad,
            HAS_GRAD_TARGET=grad_target is not None,
            ALIASED=aliases_input(grad, prediction),
            BLOCK=config.block,
            WIDTH=config.width,
            **launch_options(
                config, width, prediction.stride(0), target.stride(0), grad.stride(0), written.stride(0)
            ),
        )
    return distances
