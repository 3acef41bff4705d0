"""The losses between inner layers under `torch.compile`: one node, the same numbers, also for a second shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import cosine_loss, projection_mse, relation_kl
from tests.support.inputs import DEVICE, FAST_IMPLS

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def losses(impl: str) -> dict[str, Loss]:
    """By name, of student (B, N, 16), teacher (B, N, 24), weight (24, 16) and mask (B, N)."""
    options: dict[str, Any] = {"impl": impl}
    return {
        "projection_mse": lambda s, t, w, m: projection_mse([s, 2.0 * s], [t, t], w, mask=m, **options),
        "cosine_loss": lambda s, t, w, m: cosine_loss(s, t, w, mask=m, **options),
        # Two calls with one set of options are two nodes with one solver.
        "relation_kl": lambda s, t, w, m: (
            relation_kl(s, t, heads=2, mask=m, **options)
            + relation_kl(s @ w.T, t, heads=(2, 4), mask=m, causal=True, **options)
            + relation_kl(s.square(), t, heads=2, mask=m, **options)
        ),
    }


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("name", ["projection_mse", "cosine_loss", "relation_kl"])
def test_one_graph_and_the_same_numbers(name: str, impl: str) -> None:
    loss = losses(impl)[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for length in (5, 7):
        student = torch.randn(2, length, 16, device=DEVICE, requires_grad=True)
        teacher = torch.randn(2, length, 24, device=DEVICE)
        weight = torch.randn(24, 16, device=DEVICE, requires_grad=True)
        mask = torch.arange(length, device=DEVICE).expand(2, length) < length - 2
        leaves = (student, weight)
        expected, actual = (
            [value.detach(), *torch.autograd.grad(value, leaves)]
            for value in (function(student, teacher, weight, mask) for function in (loss, compiled))
        )
        for ours, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, other)
