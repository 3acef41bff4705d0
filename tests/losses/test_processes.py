"""The losses in several processes: the wrappers of torch with the head inside forward, and a sharded vocabulary."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdkernels import Decoupled, LinearKDLoss, TeacherHead, linear_kd_loss
from tests.support.host_copies import CountHostCopies
from tests.support.inputs import TILED
from tests.support.interpreter import patch_language_once
from tests.support.processes import run_processes

pytestmark = pytest.mark.xdist_group("programs")

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


VOCABULARY = 41  # in 2 and 3 slices of unequal sizes
ROWS, WIDTH, TEACHER_WIDTH = 6, 5, 4


def sharded_cases() -> list[dict[str, Any]]:
    """Every divergence, and every option that the steps between the ranks could get wrong."""
    cases: list[dict[str, Any]] = [{"divergence": one} for one in (*TILED, Decoupled(0.7, 1.3))]
    cases += [
        {"temperature": 2.5, "softcap": 3.0, "logit_scale": 0.7},
        {"divergence": "jsd", "reduction": "none", "temperature": 0.5},
        {"label_smoothing": 0.1, "static_shapes": True, "divergence": "reverse_kl"},
        {"chunk_bytes": 328, "divergence": "tvd"},  # 2 rows a chunk of one slice alone, 1 of the other
        {"chunk_bytes": 1024, "token_weight": torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)},
    ]
    return [{"ce_weight": 0.4, **case} for case in cases]


def sharded_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "hidden": (ROWS, WIDTH),
        "weight": (VOCABULARY, WIDTH),
        "bias": (VOCABULARY,),
        "teacher_hidden": (ROWS, TEACHER_WIDTH),
        "teacher_weight": (VOCABULARY, TEACHER_WIDTH),
        "teacher_bias": (VOCABULARY,),
    }
    found = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return {**found, "labels": torch.tensor([0, 40, -100, 20, 13, 27])}


def solve(inputs: dict[str, Tensor], group: Any, columns: slice, **options: Any) -> list[Tensor]:
    """Loss, and gradients of hidden states, weight and bias, from a slice of both heads."""
    hidden = inputs["hidden"].clone().requires_grad_()
    weight, bias = (inputs[name][columns].clone().requires_grad_() for name in ("weight", "bias"))
    teacher = TeacherHead(
        inputs["teacher_hidden"], inputs["teacher_weight"][columns], inputs["teacher_bias"][columns]
    )
    loss = linear_kd_loss(
        hidden,
        weight,
        teacher,
        inputs["labels"],
        student_bias=bias,
        vocab_group=group,
        **options,
    )
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), upstream)]


def slices(world: int) -> list[slice]:
    """Unequal slices in the order of the ranks."""
    edges = [0, 17, VOCABULARY] if world == 2 else [0, 9, 30, VOCABULARY]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def sharded_losses(rank: int, world: int) -> list[list[Tensor]]:
    inputs, group = sharded_inputs(), torch.distributed.group.WORLD
    return [solve(inputs, group, slices(world)[rank], impl="torch", **options) for options in sharded_cases()]


@pytest.mark.parametrize("world", [2, 3])
def test_a_sharded_vocabulary_equals_one_process(world: int, tmp_path: Path) -> None:
    found = run_processes(sharded_losses, world, tmp_path, world)
    inputs = sharded_inputs()
    for number, options in enumerate(sharded_cases()):
        loss, d_hidden, d_weight, d_bias = solve(inputs, None, slice(None), impl="torch", **options)
        for rank, columns in enumerate(slices(world)):
            expected = (loss, d_hidden, d_weight[columns], d_bias[columns])
            for name, ours, whole in zip(
                ("loss", "hidden", "weight", "bias"), found[rank][number], expected, strict=True
            ):
                torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12, msg=f"{name} of {options}")


def host_copies(rank: int) -> dict[int, list[str]]:
    """What makes the host wait in a call of one chunk, and of three."""
    inputs, group, found = sharded_inputs(), torch.distributed.group.WORLD, {}
    for chunk_bytes in (8 * 41 * ROWS, 8 * 41 * 2):
        with CountHostCopies() as counter:
            solve(inputs, group, slices(2)[rank], impl="torch", chunk_bytes=chunk_bytes, static_shapes=True)
        found[chunk_bytes] = counter.found
    return found


def test_no_chunk_of_a_shard_copies_from_the_host(tmp_path: Path) -> None:
    """Indices that are lists, and tensors of numbers, are copied to a device, for which the host waits."""
    for found in run_processes(host_copies, 2, tmp_path):
        one, several = found.values()
        assert one == several == ["aten::lift_fresh"]  # the sizes that the ranks exchange


def two_heads(rank: int) -> list[float]:
    """Losses with two heads in turn, whose slices are equally long on the first rank and not on the second."""
    inputs, group = sharded_inputs(), torch.distributed.group.WORLD
    smaller = {name: tensor[:30] if name != "labels" else tensor for name, tensor in inputs.items()}
    smaller["labels"] = inputs["labels"] % 30
    return [
        float(solve(one, group, slice(0, 17) if rank == 0 else slice(17, None), impl="torch")[0])
        for one in (inputs, smaller, inputs)
    ]


def test_heads_of_other_sizes_in_one_group(tmp_path: Path) -> None:
    """A rank that remembered sizes would not enter the exchange that the others wait in."""
    first, second = run_processes(two_heads, 2, tmp_path)
    assert first == second and first[0] == first[2] != first[1]


def unequal_rows(rank: int) -> str:
    inputs = sharded_inputs()
    for name in ("hidden", "teacher_hidden", "labels"):
        inputs[name] = inputs[name][: ROWS - rank]
    with pytest.raises(ValueError) as caught:
        solve(inputs, torch.distributed.group.WORLD, slices(2)[rank], impl="torch")
    return str(caught.value)


def test_ranks_with_other_rows_are_told(tmp_path: Path) -> None:
    for sentence in run_processes(unequal_rows, 2, tmp_path):
        assert sentence.startswith(
            "the ranks of vocab_group must have the same rows, got [6, 5] rows on ranks 0 to 1"
        )


def sharded_kernels(rank: int) -> list[list[Tensor]]:
    inputs = {
        name: tensor if name == "labels" else tensor.float() for name, tensor in sharded_inputs().items()
    }
    group = torch.distributed.group.WORLD
    patch_language_once()
    return [
        solve(inputs, group, slices(2)[rank], divergence=one, ce_weight=0.4, temperature=2.0, impl="triton")
        for one in ("forward_kl", "jsd", Decoupled(0.7, 1.3))
    ]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the processes are on the CPU: kernels in the interpreter"
)
def test_a_sharded_vocabulary_through_the_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = run_processes(sharded_kernels, 2, tmp_path)
    for number, divergence in enumerate(("forward_kl", "jsd", Decoupled(0.7, 1.3))):
        options = {"divergence": divergence, "ce_weight": 0.4, "temperature": 2.0, "impl": "torch"}
        loss, d_hidden, d_weight, d_bias = solve(sharded_inputs(), None, slice(None), **options)
        for rank, columns in enumerate(slices(2)):
            for ours, whole in zip(
                found[rank][number], (loss, d_hidden, d_weight[columns], d_bias[columns]), strict=True
            ):
                torch.testing.assert_close(ours.double(), whole, rtol=1e-5, atol=1e-6)


def refusals(rank: int) -> list[str]:
    """What a rank says to inputs that do not fit the whole vocabulary."""
    inputs, said = sharded_inputs(), []
    for label in (VOCABULARY, -1):
        inputs["labels"] = torch.tensor([0, 1, 2, 3, 4, label])
        try:
            solve(inputs, torch.distributed.group.WORLD, slices(2)[rank], impl="torch")
        except ValueError as error:
            said.append(str(error))
    return said


def test_labels_are_ids_of_the_whole_vocabulary(tmp_path: Path) -> None:
    for said in run_processes(refusals, 2, tmp_path):
        assert len(said) == 2
        for sentence, label in zip(said, (VOCABULARY, -1), strict=True):
            assert sentence.startswith(
                f"labels must be in [0, {VOCABULARY}) or equal to ignore_index, got {label}"
            )
