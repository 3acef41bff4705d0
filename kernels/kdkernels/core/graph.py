"""The operator of a loss in a compiled graph. Imported by compiled code only: it needs the compiler.

It does what `dispatch.row_loss_and_aux` does, with the gradients as further outputs. Valid rows are gathered
inside, so a graph has fixed shapes whatever the labels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import nonstrict_trace

from ..options import Reduction
from ..stats import KDStats
from .autograd import (
    Solver,
    Tensors,
    gradients_for,
    loss_and_aux,
    loss_and_gradients,
    state_size,
    values_and_state,
)
from .matmul import accum_dtype
from .packing import FUNCTIONS, unpack

_SOLVERS: dict[str, Solver] = {}
_library = torch.library.Library("kdkernels", "DEF")
# The host reads how many rows are valid, which no CUDA graph can hold: `mode="reduce-overhead"` cuts its graphs here.
_TAGS = (torch.Tag.cudagraph_unsafe,)
# A list that holds None is not seen by autograd, so absent tensors are left out and `present` says which.
_library.define(
    "row_loss(Tensor[] tensors, bool[] present, bool[] needs, Tensor? weight, Tensor denominator, str solver, "
    "str reduction) -> Tensor[]",
    tags=_TAGS,
)
_library.define(
    "row_gradients(Tensor[] tensors, bool[] present, bool[] needs, Tensor? weight, Tensor denominator, str solver, "
    "str reduction, Tensor upstream, Tensor state) -> Tensor[]",
    tags=_TAGS,
)
_library.define("refuse(Tensor anchor, str sentence, str kind) -> Tensor")
_REFUSALS = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}


@nonstrict_trace
def call(name: str, arguments: Any, options: dict[str, Any]) -> Any:
    """The public function `name`, run on tensors without values; its work becomes one node."""
    given = unpack(arguments)
    try:
        found = FUNCTIONS[name](*given, **{key: unpack(value) for key, value in options.items()})
        return (found[0], tuple(found[1])) if isinstance(found, tuple) else found
    except (ValueError, NotImplementedError) as error:
        # Raised when the graph runs: now, the compiler would replace the sentence by one of its own.
        anchor = next(tensor for tensor in (*given, *options.values()) if isinstance(tensor, Tensor))
        kind = "NotImplementedError" if isinstance(error, NotImplementedError) else "ValueError"
        refused = torch.ops.kdkernels.refuse(anchor.detach(), str(error), kind)
        return (
            (refused, (refused,) * len(KDStats._fields)) if options.get("return_stats") is True else refused
        )


@torch.library.impl(_library, "refuse", "CompositeExplicitAutograd")
def _refuse(anchor: Tensor, sentence: str, kind: str) -> Tensor:
    raise _REFUSALS[kind](sentence)


@torch.library.register_fake("kdkernels::refuse", lib=_library)
def _(anchor: Tensor, sentence: str, kind: str) -> Tensor:
    return anchor.new_empty(())


def row_loss(
    solver: Solver,
    tensors: Tensors,
    weight: Tensor | None,
    denominator: Tensor,
    reduction: Reduction,
    gradient_in_forward: bool,
) -> tuple[Tensor, Tensor | None]:
    """`dispatch.row_loss_and_aux` as a node."""
    # The graph names its solver by a string; equal solvers have equal ones, so a second trace adds nothing.
    name = repr(solver)
    _SOLVERS[name] = solver
    given = [tensor for tensor in tensors if tensor is not None]
    present = [tensor is not None for tensor in tensors]
    now = gradient_in_forward and reduction != "none" and torch.is_grad_enabled()
    needs = [now and tensor.requires_grad for tensor in given]
    loss, rest, *_ = torch.ops.kdkernels.row_loss(given, present, needs, weight, denominator, name, reduction)
    return loss, rest if _aux_outputs(name) else None


def _aux_outputs(solver: str) -> int:
    """Numbers per row that the solver gives beside its loss."""
    return getattr(_SOLVERS[solver], "aux_outputs", 0)


def _placed(values: Sequence[Any], present: list[bool], absent: Any) -> tuple[Any, ...]:
    """One value per tensor of the solver, `absent` where it was given none."""
    left = iter(values)
    return tuple(next(left) if there else absent for there in present)


@torch.library.impl(_library, "row_loss", "CompositeExplicitAutograd")
def _row_loss(
    tensors: list[Tensor],
    present: list[bool],
    needs: list[bool],
    weight: Tensor | None,
    denominator: Tensor,
    solver: str,
    reduction: Reduction,
) -> list[Tensor]:
    placed, state = _placed(tensors, present, None), None
    if any(needs):
        loss, rest, gradients, factor = loss_and_gradients(
            _SOLVERS[solver], placed, weight, denominator, reduction, _placed(needs, present, False)
        )
    else:
        values, state = values_and_state(_SOLVERS[solver], placed, weight)
        loss, rest = loss_and_aux(values, weight, denominator, reduction)
        gradients, factor = (None,) * len(placed), None
    rest = loss.new_empty(0) if rest is None else rest
    factor = torch.ones_like(denominator) if factor is None else factor
    found = zip(gradients, placed, strict=True)
    return [
        loss,
        rest,
        loss.new_empty(0) if state is None else state,
        factor,
        # In float32 until backward knows the upstream factor, so that they are rounded once.
        *[g.to(accum_dtype(t.dtype)) for g, t in found if g is not None and t is not None],
    ]


@torch.library.register_fake("kdkernels::row_loss", lib=_library)
def _(
    tensors: list[Tensor],
    present: list[bool],
    needs: list[bool],
    weight: Tensor | None,
    denominator: Tensor,
    solver: str,
    reduction: Reduction,
) -> list[Tensor]:
    shape = tensors[0].shape[:1] if reduction == "none" else ()
    kept = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    gradients = [torch.empty(t.shape, dtype=accum_dtype(t.dtype), device=t.device) for t in kept]
    aux_outputs = _aux_outputs(solver)
    rest = denominator.new_empty((aux_outputs, *tensors[0].shape[:1]) if aux_outputs else (0,))
    size = 0 if any(needs) else state_size(_SOLVERS[solver])
    state = denominator.new_empty((size, *tensors[0].shape[:1]) if size else (0,))
    return [denominator.new_empty(shape), rest, state, torch.empty_like(denominator), *gradients]


@torch.library.impl(_library, "row_gradients", "CompositeExplicitAutograd")
def _row_gradients(
    tensors: list[Tensor],
    present: list[bool],
    needs: list[bool],
    weight: Tensor | None,
    denominator: Tensor,
    solver: str,
    reduction: Reduction,
    upstream: Tensor,
    state: Tensor,
) -> list[Tensor]:
    placed, wanted = _placed(tensors, present, None), _placed(needs, present, False)
    kept = state if state_size(_SOLVERS[solver]) else None
    found = gradients_for(_SOLVERS[solver], placed, weight, denominator, reduction, upstream, wanted, kept)
    return [gradient for gradient in found if gradient is not None]


@torch.library.register_fake("kdkernels::row_gradients", lib=_library)
def _(
    tensors: list[Tensor],
    present: list[bool],
    needs: list[bool],
    weight: Tensor | None,
    denominator: Tensor,
    solver: str,
    reduction: Reduction,
    upstream: Tensor,
    state: Tensor,
) -> list[Tensor]:
    kept = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in kept]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.present, ctx.stored, weight, denominator, ctx.solver, ctx.reduction = inputs
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    ctx.save_for_backward(*(output[3:] if any(ctx.stored) else (weight, denominator, output[2], *tensors)))


def _backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    if any(ctx.stored):
        factor, *gradients = ctx.saved_tensors
        needs, factor = ctx.stored, upstream[0] * factor
        found = iter([gradient * factor for gradient in gradients])
    else:
        weight, denominator, state, *tensors = ctx.saved_tensors
        needs = [tensor.requires_grad for tensor in tensors]
        operator = torch.ops.kdkernels.row_gradients
        found = iter(
            operator(
                tensors,
                ctx.present,
                needs,
                weight,
                denominator,
                ctx.solver,
                ctx.reduction,
                upstream[0],
                state,
            )
        )
    wanted = zip(needs, ctx.dtypes, strict=True)
    return [next(found).to(dtype) if need else None for need, dtype in wanted], *(None,) * 6


torch.library.register_autograd("kdkernels::row_loss", _backward, setup_context=_keep, lib=_library)
