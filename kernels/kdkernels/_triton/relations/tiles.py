"""What the kernels of relations share: rows of one head, matmuls, valid tokens, the stored statistics of a row."""

import triton
import triton.language as tl

# The score of a masked pair: finite, since -inf - -inf is NaN, and below any score of a valid one.
NOT_COUNTED = tl.constexpr(-1.0e30)

# Rows of the statistics: maximum and 1 / sum of the student, of the teacher, and the divergence.
STATISTICS = 5


@triton.jit
def load_rows(
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
def product(left, right, INTERPRETED: tl.constexpr):
    """left @ right in fp32, exact to fp32's digits for fp32.

    A device adds up the columns in one order, so that a score is the same number in a map and in its transpose: gradients
    take its exponential from maxima that the values kept. numpy takes another order for a transposed matmul, and bfloat16
    for integers; from float64 both matmuls are rounded once.
    """
    if INTERPRETED:
        return tl.dot(left.to(tl.float64), right.to(tl.float64)).to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def counts(mask_ptr, first, tokens, N, HAS_MASK: tl.constexpr):
    """(BLOCK,) whether a token is in the sequence and valid."""
    inside = tokens < N
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + first + tokens, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_statistics(statistics_ptr, statistic_size, tokens, valid):
    """Maximum and 1 / sum of the student and of the teacher, (BLOCK,) each; 0 where nothing counts."""
    # One step after the other: a product of their size leaves int32 with 5e8 tokens and heads.
    maximum_s = statistics_ptr + tokens
    inverse_s = maximum_s + statistic_size
    maximum_t = inverse_s + statistic_size
    inverse_t = maximum_t + statistic_size
    return (
        tl.load(maximum_s, mask=valid, other=0.0),
        tl.load(inverse_s, mask=valid, other=0.0),
        tl.load(maximum_t, mask=valid, other=0.0),
        tl.load(inverse_t, mask=valid, other=0.0),
    )
