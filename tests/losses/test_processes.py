"""The losses in several processes: the wrappers of torch, with the head inside the wrapped forward."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdkernels import LinearKDLoss
from tests.support.processes import run_processes

WORLD = 2


class Student(nn.Module):
    """A body, a head, and the loss that uses the head inside forward, where wrappers have its whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 30)
        self.loss = LinearKDLoss(divergence="jsd", temperature=2.0, ce_weight=0.5)

    def forward(self, inputs: Tensor, teacher: Tensor, labels: Tensor, counted: int) -> Tensor:
        return self.loss(
            self.body(inputs),
            self.head.weight,
            teacher,
            labels,
            student_bias=self.head.bias,
            num_items_in_batch=counted,
        )


def make_batch() -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows of which the processes count 1 and 3."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([3, -100, -100, -100, 7, 29, 0, -100])
    inputs, teacher = (torch.randn(8, width, generator=generator) for width in (6, 30))
    return inputs, teacher, labels, 4


def gradients_of(wrapper: str, rank: int) -> dict[str, Tensor]:
    """One backward on this process's half of the batch; wrappers average, the loss is a share of a sum."""
    torch.manual_seed(0)
    student = Student()
    wrapped: nn.Module = student
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(student)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(student.body, mesh=mesh)
        fully_shard(student, mesh=mesh)
    *rows, counted = make_batch()
    inputs, teacher, labels = (tensor.chunk(WORLD)[rank] for tensor in rows)
    (wrapped(inputs, teacher, labels, counted) * WORLD).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients.items()
        if gradient is not None
    }


def both_wrappers(rank: int) -> list[dict[str, Tensor]]:
    return [gradients_of("ddp", rank), gradients_of("fsdp", rank)]


def test_ddp_and_fsdp2_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Student()
    student(*make_batch()).backward()
    for found in run_processes(both_wrappers, WORLD, tmp_path):
        for gradients in found:
            for name, parameter in student.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad)
