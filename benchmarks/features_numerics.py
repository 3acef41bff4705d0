"""`python -m benchmarks.features_numerics`: errors of the losses between inner layers against float64, beside eager's."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import cosine_loss, projection_mse, relation_kl

BATCH, TOKENS, WIDTH, HEADS = 2, 128, 256, 4
# Float16 ends at 6e-8, and a mean over 256 tokens has gradients below: a loss scale, as training in float16 has it.
LOSS_SCALE = 2.0**12

Loss = Callable[[Tensor, Tensor], Tensor]


def log_relations(features: Tensor) -> Tensor:
    """(B, heads, N, N) by the lines that `relation_kl` replaces."""
    heads = features.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return F.log_softmax(heads @ heads.transpose(2, 3) / math.sqrt(heads.shape[-1]), -1)


def eager_relation_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The docstring's lines."""
    student, teacher = log_relations(student), log_relations(teacher)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "cosine_loss": (cosine_loss, lambda s, t: (1.0 - F.cosine_similarity(s, t, dim=-1)).mean()),
    "projection_mse, normalize": (
        lambda s, t: projection_mse(s, t, normalize=True),
        lambda s, t: F.mse_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1)),
    ),
    "relation_kl": (lambda s, t: relation_kl(s, t, heads=HEADS), eager_relation_kl),
}


def solve(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and scaled gradient in float64."""
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value * LOSS_SCALE, student)
    return value.detach().double(), gradient.double()


def main() -> None:
    """Print the table."""
    print("| student (value) | loss | dtype | value | gradient |\n|---|---|---|---|---|")
    for where, noise in (("near", 0.02), ("far", None)):
        for name, contenders in LOSSES.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                torch.manual_seed(0)
                teacher, other = torch.randn(2, BATCH, TOKENS, WIDTH)
                student = (other if noise is None else teacher + noise * other).to(dtype)
                teacher = teacher.to(dtype)
                exact = solve(contenders[1], student.double(), teacher.double())
                cells = [
                    " / ".join(f"{(found[part] - exact[part]).norm() / exact[part].norm():.1e}" for found in both)
                    for both in [[solve(loss, student, teacher) for loss in contenders]]
                    for part in (0, 1)
                ]  # fmt: skip
                print(
                    f"| {where} ({exact[0]:.3g}) | {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |"
                )


if __name__ == "__main__":
    main()
