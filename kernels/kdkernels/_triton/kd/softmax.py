"""The two row kernels of teachers that are a few numbers per token: log-sum-exps, and a multiple of the softmax.

All that has the size of the kept entries is done in `logits/top_k.py`. Bytes moved per logit: one read for the
statistics, one read and one write for the gradient; 10 with fp32 logits and a half gradient, 6 with half logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aliasing import aliases_input
from ..launch import RowConfig, architecture_of, device_guard, launch_options, row_config
from ..numeric import LN_2, LOG2_E, join_lanes, softmax_step, store_tile, sum_at_one_step, write_zeros
from .row import LogitRow, load_logits


@triton.jit
def _statistics_step(state, side, columns, inside, scale, AT_ONE: tl.constexpr):
    """Take one tile into the (maximum, sum, sum at temperature 1) of every lane."""
    maximum, total, total_at_one = state
    logits = load_logits(side, columns, inside, False, "none")
    next_maximum, total, shifted = softmax_step(maximum, total, logits, scale)
    if AT_ONE:
        total_at_one = sum_at_one_step(total_at_one, maximum, next_maximum, shifted)
    return next_maximum, total, total_at_one


# As in `rows.py`: another number of rows, or a chunk that starts elsewhere, does not recompile.
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["row_weight_ptr", "statistics_ptr"])
def _row_statistics_kernel(
    logits_ptr,  # (R, V)
    row_weight_ptr,  # (R,) fp32, read when HAS_ROW_WEIGHT
    statistics_ptr,  # (3, R) fp32, written
    stride_logits_row,
    R,
    V,
    inverse_temperature,
    AT_ONE: tl.constexpr,  # the second row is another number than the first
    HAS_ROW_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    if HAS_ROW_WEIGHT:
        weight = tl.load(row_weight_ptr + row)
        if weight == 0.0:  # nothing of the row is read
            tl.store(statistics_ptr + row, 0.0)
            tl.store(statistics_ptr + R + row, 0.0)
            tl.store(statistics_ptr + 2 * R + row, 0.0)
            return
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    side = LogitRow(logits_ptr + row * stride_logits_row, logits_ptr, 1.0, 1.0)
    scale = inverse_temperature * LOG2_E
    nothing = tl.zeros((LANES,), tl.float32)
    state = (tl.full((LANES,), float("-inf"), tl.float32), nothing, nothing)
    full_blocks = V // BLOCK
    for block in range(full_blocks):
        state = _statistics_step(state, side, block * BLOCK + tile, None, scale, AT_ONE)
    if full_blocks * BLOCK < V:
        columns = full_blocks * BLOCK + tile
        state = _statistics_step(state, side, columns, columns < V, scale, AT_ONE)
    maximum, total, total_at_one = state
    reference, row_total = join_lanes(maximum, total, scale)
    # Measured from the largest logit, so that an offset of the row costs no digits.
    log_sum = tl.log2(row_total) * LN_2
    log_sum_at_one = log_sum
    if AT_ONE:
        _, row_total = join_lanes(maximum, total_at_one, LOG2_E)
        log_sum_at_one = tl.log2(row_total) * LN_2
    tl.store(statistics_ptr + row, reference)
    tl.store(statistics_ptr + R + row, log_sum)
    tl.store(statistics_ptr + 2 * R + row, log_sum_at_one)


def row_statistics(
    logits: Tensor,  # (R, V)
    *,
    temperature: float,
    at_one: bool,
    row_weight: Tensor | None = None,  # (R,)
    config: RowConfig | None = None,
) -> Tensor:  # (3, R) fp32
    """The largest logit, and measured from it the log-sum-exps at the temperature and, if `at_one`, at 1, else the same again.

    The contract is `core.backend.Backend.row_statistics`. fp16, bf16 or fp32, the last axis contiguous.
    """
    rows, vocabulary = logits.shape
    statistics = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return statistics
    if config is None:
        config = row_config(architecture_of(logits.device))
    with device_guard(logits.device):
        _row_statistics_kernel[(rows,)](
            logits_ptr=logits,
            row_weight_ptr=logits if row_weight is None else row_weight.contiguous(),
            statistics_ptr=statistics,
            stride_logits_row=logits.stride(0),
            R=rows,
            V=vocabulary,
            inverse_temperature=1.0 / temperature,
            AT_ONE=at_one and temperature != 1.0,
            HAS_ROW_WEIGHT=row_weight is not None,
            BLOCK=config.block,
            WIDTH=config.width,
            **launch_options(config, vocabulary, logits.stride(0)),
        )
    return statistics


@triton.jit
def _gradient_step(
    side, grad_row, columns, numbers, V, AT_ONE: tl.constexpr, ALIASED: tl.constexpr, MASKED: tl.constexpr
):
    """One tile of the gradient."""
    inverse_temperature, reference, log_sum, log_sum_at_one, factor, factor_at_one, constant = numbers
    logits = load_logits(side, columns, columns < V if MASKED else None, False, "none") - reference
    gradient = factor * tl.exp2((logits * inverse_temperature - log_sum) * LOG2_E) + constant
    if AT_ONE:
        gradient += factor_at_one * tl.exp2((logits - log_sum_at_one) * LOG2_E)
    if ALIASED:
        tl.debug_barrier()  # as in `passes.last_step`
    store_tile(grad_row, columns, gradient, V, MASKED)


@triton.jit(
    do_not_specialize=["R"],
    do_not_specialize_on_alignment=["statistics_ptr", "factor_ptr", "factor_at_one_ptr", "constant_ptr"],
)
def _softmax_gradient_kernel(
    logits_ptr,  # (R, V)
    statistics_ptr,  # (3, R) fp32
    factor_ptr,  # (R,) fp32
    factor_at_one_ptr,  # (R,) fp32, read when AT_ONE
    constant_ptr,  # (R,) fp32, read when HAS_CONSTANT
    grad_ptr,  # (R, V), may share memory with logits_ptr
    stride_logits_row,
    stride_grad_row,
    R,
    V,
    inverse_temperature,
    AT_ONE: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    ALIASED: tl.constexpr,  # grad holds narrower numbers in the rows of the logits
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)  # rows x stride leaves int32
    LANES: tl.constexpr = BLOCK // WIDTH
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    grad_row = grad_ptr + row * stride_grad_row
    factor = tl.load(factor_ptr + row)
    factor_at_one = 0.0
    if AT_ONE:
        factor_at_one = tl.load(factor_at_one_ptr + row)
    if (factor == 0.0) & (factor_at_one == 0.0):  # nothing of the row is read
        write_zeros(grad_row, V, tile, BLOCK)
        return
    constant = 0.0
    if HAS_CONSTANT:
        constant = tl.load(constant_ptr + row)
    side = LogitRow(logits_ptr + row * stride_logits_row, logits_ptr, 1.0, 1.0)
    reference = tl.load(statistics_ptr + row)
    log_sum = tl.load(statistics_ptr + R + row)
    log_sum_at_one = tl.load(statistics_ptr + 2 * R + row)
    numbers = (inverse_temperature, reference, log_sum, log_sum_at_one, factor, factor_at_one, constant)
    full_blocks = V // BLOCK
    for block in range(full_blocks):
        _gradient_step(side, grad_row, block * BLOCK + tile, numbers, V, AT_ONE, ALIASED, False)
    if full_blocks * BLOCK < V:
        _gradient_step(side, grad_row, full_blocks * BLOCK + tile, numbers, V, AT_ONE, ALIASED, True)


def softmax_gradient(
    logits: Tensor,  # (R, V)
    statistics: Tensor,  # (3, R) fp32
    factor: Tensor,  # (R,) fp32
    factor_at_one: Tensor | None,  # (R,) fp32
    constant: Tensor | None,  # (R,) fp32
    *,
    temperature: float,
    grad: Tensor,  # (R, V)
    config: RowConfig | None = None,
) -> None:
    """Multiples of the softmaxes at the temperature and at 1, and a constant.

    The contract is `core.backend.Backend.softmax_gradient`; `grad` may alias the logits as in `kd_rows`.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    aliased = aliases_input(grad, logits)
    if config is None:
        config = row_config(architecture_of(logits.device))
    with device_guard(logits.device):
        _softmax_gradient_kernel[(rows,)](
            logits_ptr=logits,
            statistics_ptr=statistics.contiguous(),
            factor_ptr=factor.contiguous(),
            # A pointer that its flag leaves unread is given the factors, so that one signature serves all.
            factor_at_one_ptr=factor if factor_at_one is None else factor_at_one.contiguous(),
            constant_ptr=factor if constant is None else constant.contiguous(),
            grad_ptr=grad,
            stride_logits_row=logits.stride(0),
            stride_grad_row=grad.stride(0),
            R=rows,
            V=vocabulary,
            inverse_temperature=1.0 / temperature,
            AT_ONE=factor_at_one is not None,
            HAS_CONSTANT=constant is not None,
            ALIASED=aliased,
            BLOCK=config.block,
            WIDTH=config.width,
            **launch_options(config, vocabulary, logits.stride(0), grad.stride(0)),
        )
