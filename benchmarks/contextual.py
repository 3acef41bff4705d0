"""contextual_relation_loss beside the eager formula of the study it replaces: `python -m benchmarks --suite contextual`.

Loss and gradient of the student's features, no mask.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operation import Operation, Step, with_backward


@dataclass(frozen=True)
class Case:
    """Features (batch, layers, length, width) of a student and a teacher."""

    batch: int
    layers: int
    length: int
    width: int
    teacher_width: int
    window: int = 10
    layer_weight: float = 0.0
    device: str = "cpu"

    @property
    def family(self) -> str:
        return "contextual"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def name(self) -> str:
        layers = f", layer-transforming relation x {self.layer_weight:g}" if self.layer_weight else ""
        return (
            f"contextual_relation_loss, B={self.batch}, L={self.layers}, N={self.length}, D_s={self.width}, "
            f"D_t={self.teacher_width}, window {self.window}, float32{layers}"
        )


CPU = (Case(8, 3, 256, 256, 512), Case(8, 3, 256, 256, 512, layer_weight=1.0))
GPU = (Case(16, 7, 512, 384, 768, device="cuda"),)  # the study's own batch
SMOKE = (Case(2, 2, 64, 32, 48, window=4, layer_weight=1.0),)


def make_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Student and teacher features of one latent meaning a token; neighbours share half of it, layers differ by noise."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    meaning = normal(case.batch, 1, case.length, 32)
    meaning = meaning + meaning.roll(1, 2)

    def features(width: int, noise: float) -> Tensor:
        return meaning @ normal(32, width) / 8.0 + noise * normal(case.batch, case.layers, case.length, width)

    return features(case.width, 0.7).requires_grad_(), features(case.teacher_width, 0.5)


def _around(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(length, device=device)
    if window >= length:
        return positions.expand(length, length), torch.ones((), dtype=torch.bool, device=device)
    index = positions[:, None] + torch.arange(-window, window + 1, device=device)
    return index.clamp(0, length - 1), ((index >= 0) & (index < length)).unsqueeze(-1)


def eager_relations(student: Tensor, teacher: Tensor, window: int) -> Tensor:
    """The study's two terms on one axis as plain PyTorch: every neighbour's vector gathered, compared, normalised."""
    index, inside = _around(student.shape[2], window, student.device)

    def distance(side: Tensor) -> Tensor:
        side = F.normalize(side, dim=-1)
        return 1.0 - (side[:, :, :, None] * side[:, :, index] * inside).sum(-1)

    def angle(side: Tensor) -> Tensor:
        steps = F.normalize((side[:, :, :, None] - side[:, :, index]) * inside, dim=-1)
        return torch.einsum("blnvd,blnwd->blnvw", steps, steps)

    return F.mse_loss(distance(student), distance(teacher)) + F.mse_loss(angle(student), angle(teacher))


def eager(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    """The eager loss."""
    loss = eager_relations(student, teacher, case.window)
    if case.layer_weight:
        transposed = (student.transpose(1, 2), teacher.transpose(1, 2))
        loss = loss + case.layer_weight * eager_relations(*transposed, case.window)
    return loss


def ours(case: Case, student: Tensor, teacher: Tensor, impl: Any = None) -> Tensor:
    """The library's loss as it comes: triton on a GPU, torch on a CPU."""
    from kdkernels import contextual_relation_loss

    return contextual_relation_loss(
        student, teacher, window=case.window, layer_weight=case.layer_weight, impl=impl
    )


def truth(case: Case, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The torch back end in fp64; the tests hold it to the reference, which would not fit."""
    student, teacher = inputs[0].detach().double().requires_grad_(), inputs[1].double()
    loss = ours(case, student, teacher, impl="torch")
    loss.backward()
    assert student.grad is not None
    return {"loss": loss.detach(), "hidden": student.grad}


def _contender(loss: Any) -> Any:
    def contender(case: Case, inputs: tuple[Tensor, Tensor]) -> Step:
        return with_backward(lambda: loss(case, *inputs))

    return contender


OPERATION = Operation(
    case=Case,
    make_inputs=make_inputs,
    contenders={"ours": _contender(ours), "eager": _contender(eager)},
    leaves=lambda case, inputs: {"hidden": inputs[0]},
    labels={"ours": "kdkernels", "eager": "eager PyTorch"},
    tests=("tests/losses/test_contextual.py",),
    truth=truth,
    floor=None,
)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["--suite", "contextual", *sys.argv[1:]]))
