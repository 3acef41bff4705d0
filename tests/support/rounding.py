"""The truth of a result, and the error that float32 has to expect of it, both found in float64.

Monte Carlo arithmetic (Parker, 1997): the eager lines run in float64, and each operation's result is moved at random by up to
half a step of the precision asked for. The spread over some runs follows from the condition of the formula, the number of
terms and the size of what is summed. Vector width, libraries and threads of a machine do not enter.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Runs per truth: they tell a standard deviation to a quarter.
RUNS = 8

# Operations of several roundings, run as the operations that they are made of.
_COMPOSED = {
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.logsumexp.default,
    aten.mse_loss.default,
    aten.mse_loss_backward.default,
    aten.tanh_backward.default,
}

# Sums of products: where the two factors are among the arguments.
_PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}

_SUMS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}

# One rounding of each entry of the result.
_ROUNDED = {
    "acos", "acos_backward", "add", "add_", "addcdiv", "addcmul", "atan2", "cos", "cumsum", "div", "div_",
    "exp", "expm1", "linalg_vector_norm", "log", "log1p", "log2", "logaddexp", "mul", "mul_", "pow",
    "reciprocal", "rsqrt", "rsub", "sgn", "sigmoid", "sin", "sqrt", "square", "sub", "sub_", "tanh",
}  # fmt: skip

# No rounding, though the result is a new tensor.
_EXACT = {
    "_index_put_impl_", "_local_scalar_dense", "_to_copy", "_unsafe_index", "_unsafe_view", "abs", "alias",
    "amax", "amin", "arange", "argmax", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "clamp",
    "clamp_min", "clamp_min_", "clone", "conj_physical", "constant_pad_nd", "copy", "copy_", "detach", "empty", "empty_like", "eq", "eye",
    "fill_", "flip", "full", "full_like", "gather", "ge", "gt", "index", "index_add", "index_put",
    "index_put_", "index_select", "isfinite", "isinf", "isnan", "le", "lift_fresh", "logical_and",
    "logical_not", "logical_or", "lt", "masked_fill", "masked_fill_", "max", "maximum", "min", "minimum", "nan_to_num",
    "ne", "neg", "new_empty", "new_full", "new_ones", "new_zeros", "nll_loss_backward", "nll_loss_forward",
    "nonzero", "ones", "ones_like", "relu", "repeat", "roll", "scalar_tensor", "scatter", "scatter_",
    "scatter_add", "select_backward", "sign", "slice_backward", "sort", "stack", "topk", "tril", "triu", "unfold_backward",
    "where", "zero_", "zeros", "zeros_like",
}  # fmt: skip


class _Rounding(TorchDispatchMode):
    """Round every operation on float64 tensors at random, by up to `half_step` of each result."""

    def __init__(self, half_step: float, seed: int) -> None:
        super().__init__()
        self.half_step = half_step
        self.generators: dict[torch.device, torch.Generator] = {}
        self.seed = seed
        self.scalars = random.Random(seed)

    def _noise(self, like: Tensor, middle: float) -> Tensor:
        """Of the shape of `like`: `middle`, moved by up to half a step."""
        if like.device not in self.generators:
            self.generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
        return like.clone().uniform_(
            middle - self.half_step, middle + self.half_step, generator=self.generators[like.device]
        )

    def _summed(self, result: Tensor, squares: Tensor, terms: int, scale: float = 1.0) -> Tensor:
        """A sum of `terms` numbers, added up one after the other in any order.

        Each of its n partial sums is rounded. Over all orders the sum of their squares is n/6 times the sum of squared
        terms plus n/3 times the squared total.
        """
        size = (squares * (terms / 6.0 * scale**2) + result.square() * (terms / 3.0)).sqrt()
        # An infinite sum is exact, and inf times noise of either sign is no sum.
        return result + (size * self._noise(result, 0.0)).masked_fill(~result.isfinite(), 0.0)

    def _stored(self, args: Any) -> Any:
        """Numbers among the arguments that float32 does not hold, such as 0.3, rounded once for all entries."""
        return [
            arg * (1.0 + self.scalars.uniform(-self.half_step, self.half_step))
            if isinstance(arg, float)
            and math.isfinite(arg)
            and arg != torch.tensor(arg, dtype=torch.float32).item()
            else arg
            for arg in args
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSED:
            with self:
                return decomposition_table[func](*args, **kwargs)
        result = func(*self._stored(args), **kwargs)
        if not isinstance(result, Tensor) or result.dtype != torch.float64 or func.is_view:
            return result
        if func in _PRODUCTS:
            left, right = args[_PRODUCTS[func] : _PRODUCTS[func] + 2]
            return self._summed(result, left.square() @ right.square(), left.shape[-1])
        if func in _SUMS:
            squares = func(args[0].square(), *args[1:], **kwargs)
            terms = args[0].numel() // max(result.numel(), 1)
            # A mean of squares is their sum over the number of terms once, a squared mean has it twice.
            is_mean = func in (aten.mean.default, aten.mean.dim)
            return self._summed(
                result, squares, terms, scale=1.0 / math.sqrt(max(terms, 1)) if is_mean else 1.0
            )
        name = func.overloadpacket.__name__
        if name in _EXACT or (name in ("mul", "mul_", "div", "div_") and _is_power_of_two(args[1])):
            return result
        if name not in _ROUNDED:
            raise NotImplementedError(f"{func} is in no list of tests/support/rounding.py: does it round?")
        return result.mul_(self._noise(result, 1.0))


def _is_power_of_two(factor: Any) -> bool:
    """Whether a product with it is exact."""
    if isinstance(factor, Tensor):
        factor = factor.item() if factor.dim() == 0 else math.nan
    return math.isfinite(factor) and abs(math.frexp(factor)[0]) in (0.0, 0.5)


@dataclass(frozen=True)
class Truth:
    """A result in float64, and the error that each of its entries has to expect of float32."""

    value: Tensor
    spread: Tensor

    def __getitem__(self, index: Any) -> "Truth":
        return Truth(self.value[index], self.spread[index])


_spreads: dict[tuple[Any, ...], list[Tensor]] = {}


def truths(
    compute: Callable[[], tuple[Tensor, ...]], half_step: float = torch.finfo(torch.float32).eps / 2
) -> tuple[Truth, ...]:
    """The results of `compute`, eager lines in float64, and the root mean square of what rounding changes in them.

    Args:
        compute: Runs forward and backward on float64 tensors, the same ones in each call.
        half_step: Half a step of the arithmetic that is judged: of float32, whatever dtype inputs and results have.
    """
    exact = [result.detach() for result in compute()]
    # The back ends of one case follow each other: their truth is the same, and so is its spread.
    lines = (compute.__code__.co_filename, compute.__code__.co_firstlineno)
    key = (*lines, half_step, *(result.cpu().numpy().tobytes() for result in exact))
    if key not in _spreads:
        squares = [torch.zeros_like(result) for result in exact]
        for run in range(RUNS):
            with _Rounding(half_step, seed=run):
                rounded = compute()
            for total, one, true in zip(squares, rounded, exact, strict=True):
                total.add_((one.detach() - true).square().nan_to_num(nan=0.0))
        while len(_spreads) >= 8:
            _spreads.pop(next(iter(_spreads)))
        _spreads[key] = [(total / RUNS).sqrt() for total in squares]
    return tuple(Truth(true, spread) for true, spread in zip(exact, _spreads[key], strict=True))
