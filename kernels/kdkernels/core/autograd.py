"""From row values and gradients to a loss that autograd can use.

A solver computes, for a tuple of tensors and a weight per row, the unweighted value of every row and
the gradients of `sum(weight * value)`. Two Functions turn a solver into a loss:

- `GradientInForward` for `mean` and `sum` of losses with expensive GEMMs or exponentials: the gradient is
  computed together with the value, backward only multiplies it by the upstream gradient. It is handed out
  without a copy; a second backward over a retained graph computes it again;
- `RecomputeInBackward` where the upstream gradient is needed first (`reduction="none"`) or where the
  gradient is as large as an input and bytes are what it costs (`kd_loss` on GPUs): only the inputs are kept.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Function

from ..options import Reduction
from .matmul import full_float32

Tensors = tuple[Tensor | None, ...]

DOUBLE_BACKWARD = (
    "kdkernels losses have no second derivative; they were differentiated twice (create_graph=True). "
    "Use impl='reference', which is plain autograd, where a second derivative is needed"
)

# float16 gradients of single logits would underflow, so they are written larger and divided again in
# float32. 2**16 is the end of float16: an entry may be 128 times its usual bound before it overflows.
FP16_TARGET_MAX = 512.0


class Solver(Protocol):
    """A loss as rows. The first of its tensors has the rows as its first axis."""

    @property
    def fp16_bound(self) -> float | None:
        """For float16 inputs the usual size of a logit gradient of weight 1: gradients then come back in
        float32 and stay so until backward knows the upstream factor. None for other dtypes."""
        ...

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """Row values (N,), unweighted but 0 where weight is 0, and one gradient per tensor that `needs` one.

        Values may be (1 + S, N): then S auxiliary outputs per row follow, without a gradient. Such a
        solver has S as its attribute `aux_outputs`.
        """
        ...


class ResumingSolver(Solver, Protocol):
    """A solver whose values leave numbers of each row that spare the gradients their computation."""

    @property
    def state_size(self) -> int:
        """Numbers per row; 0 where nothing is left after all."""
        ...

    def values(self, tensors: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The values of `solve`, and the state (state_size, N)."""
        ...

    def gradients(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...], state: Tensor
    ) -> Tensors:
        """The gradients of `solve`, from the state of a call for the values of the same tensors."""
        ...


def state_size(solver: Solver) -> int:
    """Numbers per row that are kept between the values and the gradients."""
    return getattr(solver, "state_size", 0)


class _NoSecondDerivative(Function):
    """The identity on gradients; differentiating it raises the sentence above."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(DOUBLE_BACKWARD)


def without_second_derivative(gradients: Tensors, upstream: Tensor, inputs: Tensors) -> Tensors:
    """The gradients; under create_graph they hang on `upstream` and `inputs` by a node that raises."""
    if not torch.is_grad_enabled():
        return gradients
    return _NoSecondDerivative.apply(len(gradients), *gradients, upstream, *inputs)


def _scale_for_fp16(row_weight: Tensor, bound: float | None) -> tuple[Tensor, Tensor | None]:
    """For float16, row weights brought to FP16_TARGET_MAX, and the factor that undoes it."""
    if bound is None or row_weight.numel() == 0:
        return row_weight, None
    peak = row_weight.abs().amax() * bound
    factor = peak.masked_fill(peak == 0, 1.0) / FP16_TARGET_MAX
    return row_weight / factor, factor


def finish(gradients: Tensors, factor: Tensor | None, dtypes: tuple[torch.dtype | None, ...]) -> Tensors:
    """Scale owned gradients by `factor`, in place where that is cheaper, and cast them to the dtypes of the inputs."""
    if factor is not None and factor.device.type == "cpu" and factor.item() == 1.0:
        factor = None  # on a CPU looking is free, and a pass over the gradient of a head is not
    return tuple(
        None if gradient is None or dtype is None else _scaled(gradient, factor, dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )


def _scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient times `factor`, rounded once to `dtype`; a device does both in one pass over it."""
    if factor is None:
        return gradient.to(dtype)
    if gradient.dtype == dtype or gradient.device.type == "cpu":  # a CPU would make a copy in float32 first
        return gradient.mul_(factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def dtypes_of(tensors: Tensors) -> tuple[torch.dtype | None, ...]:
    """The dtype of each tensor."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def reduce_rows(values: Tensor, weight: Tensor | None, denominator: Tensor, reduction: Reduction) -> Tensor:
    """Row values (N,), 0 in masked rows, to the loss."""
    if weight is not None:
        values = values * weight
    if reduction == "none":
        return values
    total = values.sum()
    return total / denominator if reduction == "mean" else total


def loss_and_aux(
    values: Tensor, weight: Tensor | None, denominator: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the auxiliary outputs (S, N) of (1 + S, N) values."""
    rest = None
    if values.dim() == 2:
        values, rest = values[0], values[1:].clone()
    return reduce_rows(values, weight, denominator, reduction), rest


def solve(
    solver: Solver, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensors]:
    """What the solver returns, its GEMMs in full float32."""
    with full_float32():
        return solver.solve(tensors, weight, needs)


def values_and_state(solver: Solver, tensors: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Values without gradients, and what the solver keeps for these."""
    if not state_size(solver):
        return solve(solver, tensors, weight, (False,) * len(tensors))[0], None
    with full_float32():
        return cast(ResumingSolver, solver).values(tensors, weight)


def loss_and_gradients(
    solver: Solver,
    tensors: Tensors,
    weight: Tensor | None,
    denominator: Tensor,
    reduction: Reduction,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensors, Tensor | None]:
    """The loss, auxiliary outputs, the gradients for an upstream gradient of 1, and a factor that they still lack, if any."""
    if not any(needs):
        values, gradients = solve(solver, tensors, weight, needs)
        return *loss_and_aux(values, weight, denominator, reduction), gradients, None
    row_weight = _row_weight(tensors, weight, denominator.new_ones(()), denominator, reduction)
    row_weight, factor = _scale_for_fp16(row_weight, solver.fp16_bound)
    values, gradients = solve(solver, tensors, row_weight, needs)
    return *loss_and_aux(values, weight, denominator, reduction), gradients, factor


def gradients_for(
    solver: Solver,
    tensors: Tensors,
    weight: Tensor | None,
    denominator: Tensor,
    reduction: Reduction,
    upstream: Tensor,
    needs: tuple[bool, ...],
    state: Tensor | None,
) -> Tensors:
    """The gradients for any upstream gradient, 0-D or one per row, each in the dtype of its tensor."""
    row_weight = _row_weight(tensors, weight, upstream, denominator, reduction)
    row_weight, factor = _scale_for_fp16(row_weight, solver.fp16_bound)
    if state is None:
        _, gradients = solve(solver, tensors, row_weight, needs)
    else:
        with full_float32():
            gradients = cast(ResumingSolver, solver).gradients(tensors, row_weight, needs, state)
    return finish(gradients, factor, dtypes_of(tensors))


def _row_weight(
    tensors: Tensors, weight: Tensor | None, upstream: Tensor, denominator: Tensor, reduction: Reduction
) -> Tensor:
    """(N,) what multiplies the gradient of each row."""
    first = tensors[0]
    assert first is not None
    factor = upstream / denominator if reduction == "mean" else upstream
    row_weight = factor.expand(first.shape[0]).contiguous()
    if weight is None:
        return row_weight
    # An upstream gradient may be infinite or NaN in masked rows.
    return (row_weight * weight).masked_fill_(weight == 0, 0.0)


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`save_for_backward`. torch refuses tensors made under inference_mode; those, which never change, are kept beside."""
    ctx.of_inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.of_inference else t for i, t in enumerate(tensors)))


def _kept(ctx: Any) -> tuple[Any, ...]:
    """What `_keep` was given."""
    return tuple(ctx.of_inference.get(i, t) for i, t in enumerate(ctx.saved_tensors))


class GradientInForward(Function):
    """A mean or sum whose gradient is computed together with its value."""

    @staticmethod
    def forward(
        ctx: Any,
        solver: Solver,
        weight: Tensor | None,
        denominator: Tensor,
        reduction: Reduction,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        needs = tuple(ctx.needs_input_grad[4:])
        loss, rest, ctx.gradients, ctx.factor = loss_and_gradients(
            solver, tensors, weight, denominator, reduction, needs
        )
        ctx.solver, ctx.reduction, ctx.dtypes = solver, reduction, dtypes_of(tensors)
        # Read again only by a second backward and by a second derivative.
        _keep(ctx, weight, denominator, *tensors)
        if rest is not None:
            ctx.mark_non_differentiable(rest)
        return loss, rest

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        gradients, inputs = ctx.gradients, ()
        if gradients is None or torch.is_grad_enabled():
            inputs = _kept(ctx)[2:]
        with torch.no_grad():
            if gradients is None:
                weight, denominator, *_ = _kept(ctx)
                needs = tuple(ctx.needs_input_grad[4:])
                _, _, gradients, _ = loss_and_gradients(
                    ctx.solver, inputs, weight, denominator, ctx.reduction, needs
                )
            # Handed out, and so scaled in place: a second pass over a retained graph computes them again.
            ctx.gradients = None
            factor = upstream[0] if ctx.factor is None else upstream[0] * ctx.factor
            scaled = finish(gradients, factor, ctx.dtypes)
        return None, None, None, None, *without_second_derivative(scaled, upstream[0], inputs)


class RecomputeInBackward(Function):
    """Any reduction; forward computes values only and keeps its inputs, and the state of a solver that has one."""

    @staticmethod
    def forward(
        ctx: Any,
        solver: Solver,
        weight: Tensor | None,
        denominator: Tensor,
        reduction: Reduction,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        values, state = values_and_state(solver, tensors, weight)
        ctx.solver, ctx.reduction = solver, reduction
        _keep(ctx, weight, denominator, state, *tensors)
        loss, rest = loss_and_aux(values, weight, denominator, reduction)
        if rest is not None:
            ctx.mark_non_differentiable(rest)
        return loss, rest

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        weight, denominator, state, *tensors = _kept(ctx)
        inputs, needs = tuple(tensors), tuple(ctx.needs_input_grad[4:])
        with torch.no_grad():
            gradients = gradients_for(
                ctx.solver, inputs, weight, denominator, ctx.reduction, upstream[0], needs, state
            )
        return None, None, None, None, *without_second_derivative(gradients, upstream[0], inputs)
