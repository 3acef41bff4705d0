"""`python -m benchmarks.contextual_numerics`: errors of contextual_relation_loss on features that are hard for inner products.

Prints the table of docs/numerics.md: relative errors against float64 of eager float32 and of the torch back end.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kdkernels import contextual_relation_loss


def smooth(features: Tensor, correlation: float) -> Tensor:
    """Every token near the one before it, as in the states of a recurrent network."""
    out = features.clone()
    for token in range(1, features.shape[2]):
        new = (1.0 - correlation**2) ** 0.5 * features[:, :, token]
        out[:, :, token] = correlation * out[:, :, token - 1] + new
    return out


def twins(features: Tensor, distance: float, step: int = 3) -> Tensor:
    """Every so many tokens one that is followed by nearly the same one."""
    out = features.clone()
    second = out[:, :, 1::step]
    second.copy_(out[:, :, ::step][:, :, : second.shape[2]])
    second.add_(distance * torch.randn_like(second))
    return out


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "independent tokens": lambda features: features,
    "a common offset of 100": lambda features: (
        features + 100.0 * torch.randn(features.shape[-1], device=features.device)
    ),
    "neighbours correlated by 0.9": lambda features: smooth(features, 0.9),
    "neighbours correlated by 0.999": lambda features: smooth(features, 0.999),
    "a third near-duplicates, at 1e-2": lambda features: twins(features, 1e-2),
    "a third near-duplicates, at 1e-5": lambda features: twins(features, 1e-5),
    "a third near-duplicates, equal": lambda features: twins(features, 0.0),
    "few near-duplicates, at 1e-3": lambda features: twins(features, 1e-3, step=40),
    "lengths from 1e-3 to 1e3": lambda features: (
        features * torch.logspace(-3, 3, features.shape[2], device=features.device).unsqueeze(1)
    ),
    "layers that add up": lambda features: 2.0 * features.cumsum(1),
}


def solve(student: Tensor, teacher: Tensor, impl: Literal["reference", "torch"]) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    leaf = student.detach().clone().requires_grad_()
    loss = contextual_relation_loss(leaf, teacher, window=4, layer_weight=1.0, impl=impl)
    return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print("| student's features | value | eager: value | gradient | torch: value | gradient |")
    print("|---|---:|---:|---:|---:|---:|")
    impls: tuple[Literal["reference", "torch"], ...] = ("reference", "torch")
    for name, kind in KINDS.items():
        teacher, student = torch.randn(2, 4, 48, 512), kind(torch.randn(2, 4, 48, 256))
        value, gradient = solve(student.double(), teacher.double(), "reference")
        cells = [name, f"{value.item():.2e}"]
        for impl in impls:
            ours, ours_gradient = solve(student, teacher, impl)
            cells.append(f"{((ours - value).abs() / value).item():.1e}")
            cells.append(f"{((ours_gradient - gradient).norm() / gradient.norm()).item():.1e}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
