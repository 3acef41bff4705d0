"""Which back end runs a loss, and what a back end has to supply.

A back end is a package (`_torch`, `_triton`) with the functions of `Backend`. Both are driven by the same schedules
(in `logits/` and `features/`) and import nothing of each other.
They are imported only when used, so that `import kdkernels` does not pull in triton.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from ..options import Impl, RowTerms
from .compiling import recorded, transformed
from .row_state import Tile


class FewRows(Protocol):
    """The loss of a few rows in as few calls as it can be had."""

    def __call__(
        self,
        student_logits: Tensor,  # (R, V), float32 or float64
        teacher_logits: Tensor,  # (R, V) of the same dtype
        labels: Tensor | None,  # (R,) int64, all of them in range; given with a cross entropy only
        terms: RowTerms,  # without label smoothing and transforms
        row_weight: float,  # multiplies every row's loss and gradient
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """The sum of the weighted losses and the gradient (R, V); None for rows and divergences that need `kd_rows`."""
        ...


class Backend(Protocol):
    """What `_torch` and `_triton` export."""

    @staticmethod
    def kd_rows(
        student_logits: Tensor,  # (R, V_s) floating, last axis contiguous, any row stride
        teacher_logits: Tensor,  # (R, V_t) likewise, its dtype may differ
        labels: Tensor | None,  # (R,) int64, read only in rows whose weight is not 0
        terms: RowTerms,
        *,
        student_bias: Tensor | None = None,  # (V_s,) added before the transforms of `terms`
        teacher_bias: Tensor | None = None,  # (V_t,)
        row_weight: Tensor | None = None,  # (R,) multiplies the gradient only; rows with 0 give exact zeros
        # (R, V_s) receives the gradient of the logits as given; may alias student_logits
        grad: Tensor | None = None,
        # How many first ids are shared, or (V_s,) teacher ids, -1 where there is none
        vocab_map: int | Tensor | None = None,
        decoupled: tuple[Tensor, Tensor] | None = None,  # (R,) weights, given iff the divergence is Decoupled
        state: Tensor | None = None,  # (ROW_STATE, R) receives what `kd_gradient` needs, where that is not 0
    ) -> tuple[Tensor, Tensor]:  # (R,) divergence and (R,) cross entropy, both without their weights
        """Divergence, cross entropy and, into `grad`, the gradient of every row."""
        ...

    # Numbers of a row that values without a gradient keep for `kd_gradient`; 0: there is no such function.
    ROW_STATE: int

    @staticmethod
    def kd_gradient(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        terms: RowTerms,
        *,
        state: Tensor,  # (ROW_STATE, R) of an earlier `kd_rows` with the same numbers
        grad: Tensor,  # (R, V_s)
        row_weight: Tensor | None = None,  # (R,) 0 wherever it was 0 then
        vocab_map: int | Tensor | None = None,
        decoupled: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The gradient of logits whose values are known, in one pass."""
        ...

    # `kd_rows` for a few rows without maps, biases, transforms and ignored rows; None where it would not be faster.
    few_rows: FewRows | None

    @staticmethod
    def row_statistics(
        logits: Tensor,  # (R, V) floating, last axis contiguous; may hold -inf
        *,
        temperature: float,
        at_one: bool,  # whether the second row is wanted; else it repeats the first
        row_weight: Tensor | None = None,  # (R,) rows with 0 give 0, whatever they hold
    ) -> Tensor:
        """(3, R) a number z of each row, log sum exp((logits - z) / temperature) and log sum exp(logits - z).

        z is the largest logit; it may be 0 in rows whose exponentials can be summed as they are. A row of nothing but
        -inf gives 0 and -inf.
        """
        ...

    @staticmethod
    def softmax_gradient(
        logits: Tensor,  # (R, V) as above
        statistics: Tensor,  # (3, R) as above, finite; the log-sum-exps may be those of more than this row
        factor: Tensor,  # (R,)
        factor_at_one: Tensor | None,  # (R,)
        constant: Tensor | None,  # (R,)
        *,
        temperature: float,
        grad: Tensor,  # (R, V), may alias the logits as in `kd_rows`
    ) -> None:
        """With (z, a, b) = statistics: factor exp((logits - z) / temperature - a) + factor_at_one exp(logits - z - b) + constant.

        Rows whose two factors are 0 become exact zeros, whatever their logits hold.
        """
        ...

    @staticmethod
    def tile_statistics(
        tile: Tile,
        terms: RowTerms,
        state: Tensor,  # (SLOTS, R) of `row_state`, added to
    ) -> None:
        """Merge a tile of the vocabulary into the normalisers of its rows."""
        ...

    @staticmethod
    def tile_sums(
        tile: Tile,  # with a teacher
        terms: RowTerms,
        state: Tensor,  # with final normalisers
    ) -> None:
        """Add a tile to the value of the divergence and to the mean that its gradient needs."""
        ...

    @staticmethod
    def tile_gradient(
        tile: Tile,
        terms: RowTerms,
        state: Tensor,  # with final normalisers, and sums where the divergence needs its mean
        *,
        vocabulary: int,  # V_s, for label smoothing
        grad: Tensor,  # (R, C), may alias the logits as in `kd_rows`
        decoupled: tuple[Tensor, Tensor] | None = None,
        add_value: bool = False,  # also what `tile_sums` adds to VALUE, where the gradient needs no sums
    ) -> None:
        """The gradient of a tile's logits."""
        ...

    @staticmethod
    def mse_rows(
        prediction: Tensor,  # (R, D) fp32 or fp64, overwritten
        target: Tensor,  # (R, D)
        *,
        bias: Tensor | None = None,  # (D,) added to the prediction
        row_weight: Tensor | None = None,  # (R,) multiplies the gradient only; rows with 0 give exact zeros
        write_grad: bool = True,
        grad: Tensor | None = None,  # (R, D) receives the gradient; None and the prediction: in its place
    ) -> Tensor:  # (R,) sums of squared differences
        """Squared differences of every row; the gradient is 2 * (prediction - target) * row_weight."""
        ...

    @staticmethod
    def direction_rows(
        prediction: Tensor,  # (R, D) fp32 or fp64, contiguous, overwritten
        target: Tensor,  # (R, D)
        *,
        cosine: bool,  # 1 - cosine of the angle, or the squared difference of the unit vectors
        bias: Tensor | None = None,  # (D,) added to the prediction
        row_weight: Tensor | None = None,  # (R,) multiplies the gradients only; rows with 0 give exact zeros
        write_grad: bool = True,
        grad: Tensor | None = None,  # (R, D) receives the gradient; None and the prediction: in its place
        grad_target: Tensor | None = None,  # (R, D) fp32 or fp64, receives the gradient of the target
    ) -> Tensor:  # (R,)
        """Distances of directions; rows shorter than NORM_EPS are zero vectors and get a gradient of 0."""
        ...

    # Numbers of a token and pair of heads that `relation_rows` keeps for the gradients; 0: it finds the gradients from the
    # same scores as the values, so that nothing is computed twice.
    RELATION_STATE: int

    @staticmethod
    def relation_rows(
        student: tuple[Tensor, Tensor],  # q and k (B, N, D_s); one tensor twice for relations to itself
        teacher: tuple[Tensor, Tensor],  # likewise, (B, N, D_t)
        mask: Tensor | None,  # (B, N) bool; masked tokens may hold anything
        heads: tuple[int, int],  # of student and teacher; one is a multiple of the other
        causal: bool,
        *,
        row_weight: Tensor | None = None,  # (B, N) multiplies the gradients only; 0 where the mask is False
        needs: tuple[bool, bool] = (False, False),  # of q and k; the first is that of the one tensor
        statistics: Tensor | None = None,  # what an earlier call without `needs` returned
    ) -> tuple[
        Tensor,  # (B, N) sums over heads of the divergences; 0 where the mask is False
        tuple[Tensor | None, Tensor | None],  # gradients as needed
        Tensor | None,  # statistics of the rows that spare a later call their computation
    ]:
        """KL divergence of the relations of every token, and the gradients of the student's features."""
        ...

    @staticmethod
    def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None, device: torch.device) -> int:
        """How many rows of logits to hold at a time, at least 1; two fp32 buffers of that many rows are kept."""
        ...


def resolve_impl(impl: Impl | None, device: torch.device, dtype: torch.dtype) -> Impl:
    """The back end to use: as asked, or triton for CUDA and ROCm tensors and torch elsewhere."""
    if device.type == "meta":
        raise ValueError("tensors on the device meta have no values; move them to a real device")
    if impl != "reference" and transformed():
        raise NotImplementedError(
            "transforms of torch.func (grad, vmap, jvp, ...) see through plain PyTorch only; use impl='reference' there, "
            "or loss.backward()"
        )
    if impl != "reference" and recorded():
        raise NotImplementedError(
            "torch.jit.trace cannot record the fast back ends; use torch.compile, or impl='reference'"
        )
    if impl is None:
        impl = "triton" if device.type == "cuda" else "torch"
    if impl == "triton":
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"impl='triton' needs CUDA or ROCm tensors, got tensors on {device}; use impl='torch' there"
            )
        if dtype == torch.float64:
            raise ValueError(
                "impl='triton' computes in float32 and would lose the digits of float64 inputs; "
                "use impl='torch' or impl='reference' for float64"
            )
    return impl


@cache
def load_backend(impl: Impl) -> Backend:
    """Import the back end; a missing triton is said in a sentence."""
    try:
        module = importlib.import_module(f"..._{impl}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "impl='triton' needs the package triton, which is not installed; install it or use impl='torch'",
            name="triton",
        ) from error
    return cast(Backend, module)
