"""The two places where eager and compiled calls part: the public function, and the loss of its rows.

A loss reads numbers back on the way (how many rows are valid, whether sums are in range), which a graph cannot do. So
`torch.compile` sees a public function's tensors and plain numbers only (`traceable`); its checks run while the graph is
made, on tensors without values; and what does the work is one operator (`graph.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ..options import Reduction
from ..stats import KDStats
from .autograd import GradientInForward, RecomputeInBackward, Solver, Tensors, loss_and_aux, solve
from .checks import refuse_unknown
from .compiling import is_tracing
from .packing import FUNCTIONS, pack

P = ParamSpec("P")
R = TypeVar("R")


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """The function, and under `torch.compile` one node that calls it."""
    name = function.__name__
    FUNCTIONS[name] = function
    known = signature(function).parameters

    @wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_dynamo_compiling():
            if not kwargs.keys() <= known.keys():
                refuse_unknown(name, kwargs, known)
            return function(*args, **kwargs)
        from .graph import call  # imports the compiler, which eager users do not wait for

        found = call(name, pack(args), {key: pack(value) for key, value in kwargs.items()})
        # The compiler knows tuples, but not named ones.
        return cast(R, (found[0], KDStats(*found[1])) if isinstance(found, tuple) else found)

    return entry


def row_loss_and_aux(
    solver: Solver,
    tensors: Tensors,
    weight: Tensor | None,
    denominator: Tensor,
    reduction: Reduction,
    *,
    gradient_in_forward: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss and the auxiliary outputs of the solver; a Function is entered only when some tensor needs a gradient."""
    if is_tracing():
        # Imports the compiler, which eager users do not wait for.
        from .graph import row_loss as traced_row_loss

        return traced_row_loss(solver, tensors, weight, denominator, reduction, gradient_in_forward)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        values, _ = solve(solver, tensors, weight, (False,) * len(tensors))
        return loss_and_aux(values, weight, denominator, reduction)
    function = GradientInForward if gradient_in_forward and reduction != "none" else RecomputeInBackward
    return function.apply(solver, weight, denominator, reduction, *tensors)


def row_loss(
    solver: Solver,
    tensors: Tensors,
    weight: Tensor | None,
    denominator: Tensor,
    reduction: Reduction,
    *,
    gradient_in_forward: bool,
) -> Tensor:
    """The loss of a solver without auxiliary outputs."""
    return row_loss_and_aux(
        solver, tensors, weight, denominator, reduction, gradient_in_forward=gradient_in_forward
    )[0]
