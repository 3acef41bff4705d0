"""`kd_loss` on logits that are there already: a classifier of 20 classes, where calls cost more than numbers, and heads of language models."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.linear_kd import need_compiler
from benchmarks.operation import Operation, Step, with_backward

TEMPERATURE = 4.0


@dataclass(frozen=True)
class Case:
    """Logits (rows, classes) of a student and a teacher: T^2 KL at temperature 4, and half the cross entropy."""

    rows: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def family(self) -> str:
        return "kd"

    @property
    def name(self) -> str:
        return f"kd forward_kl with labels, N={self.rows}, C={self.classes}, {self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """Logits of both sides, and a label for every row."""

    student: Tensor  # (N, C), requires grad
    teacher: Tensor  # (N, C)
    labels: Tensor  # (N,) int64


def make_inputs(case: Case) -> Inputs:
    """A teacher with logits of standard deviation 3, and a student near it."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape, dtype = (case.rows, case.classes), getattr(torch, case.dtype)
    teacher = 3.0 * torch.randn(shape, generator=generator, device=case.device)
    student = teacher + torch.randn(shape, generator=generator, device=case.device)
    labels = torch.randint(case.classes, (case.rows,), generator=generator, device=case.device)
    return Inputs(student.to(dtype).requires_grad_(), teacher.to(dtype), labels)


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What people write."""
    kd = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.log_softmax(teacher / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    return TEMPERATURE**2 * kd + 0.5 * F.cross_entropy(student, labels)


def ours(case: Case, inputs: Inputs) -> Step:
    """`kd_loss` as it comes."""
    from kdkernels import kd_loss

    return with_backward(
        lambda: kd_loss(inputs.student, inputs.teacher, inputs.labels, temperature=TEMPERATURE, ce_weight=0.5)
    )


def eager(case: Case, inputs: Inputs) -> Step:
    """The eager lines."""
    return with_backward(lambda: loss_of(inputs.student, inputs.teacher, inputs.labels))


def compiled(case: Case, inputs: Inputs) -> Step:
    """The same under `torch.compile`."""
    need_compiler(case.device)
    loss = torch.compile(loss_of)
    return with_backward(lambda: loss(inputs.student, inputs.teacher, inputs.labels))


def traffic(case: Case, inputs: Inputs) -> Step:
    """The floor: both logits read once and a gradient written, `torch.sub` into memory that is there."""
    target = torch.zeros_like(inputs.teacher)
    student = inputs.student.detach()
    return lambda: torch.sub(student, inputs.teacher, out=target)


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The eager lines in fp64."""
    student = inputs.student.detach().double().requires_grad_()
    loss = loss_of(student, inputs.teacher.double(), inputs.labels)
    loss.backward()
    assert student.grad is not None
    return {"loss": loss.detach(), "hidden": student.grad}


OPERATION = Operation(
    case=Case,
    make_inputs=make_inputs,
    contenders={"traffic": traffic, "ours": ours, "eager": eager, "compile": compiled},
    leaves=lambda case, inputs: {"hidden": inputs.student},
    labels={
        "traffic": "floor: logits read, gradient written",
        "ours": "kdkernels",
        "eager": "eager PyTorch",
        "compile": "torch.compile of eager",
    },
    tests=("tests/losses/test_kd_loss.py",),
    truth=truth,
    floor="traffic",
    yardsticks=frozenset({"traffic"}),
)
