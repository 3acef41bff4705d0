"""What a device would read outside of a tensor, recompile in mid-run, or add in any order, as far as a CPU shows it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import TeacherTopK, contextual_relation_loss, kd_loss, linear_kd_loss
from kdkernels.divergences import Decoupled, Divergence, ForwardKL, ReverseKL
from kdkernels.options import Mode, RowTerms
from tests.support.inputs import DEVICE, FAST_IMPLS

pytest.importorskip("triton")

from kdkernels._triton import kd_rows, mse_rows
from tests.support.row_kernels import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=repr)
@pytest.mark.parametrize("bad", [70, 1 << 20])
def test_ids_beyond_the_teacher_are_not_read(divergence, bad: int) -> None:
    """A NaN, and not what lies behind the teacher's row; rows of weight 0 stay 0."""
    student, memory = torch.randn(3, 80, device=DEVICE), torch.randn(3, 200, device=DEVICE)
    teacher = memory[:, :60]
    mapping = torch.arange(80, device=DEVICE) % 60
    mapping[7] = bad
    grad = torch.empty_like(student)
    kd, _ = kd_rows(
        student,
        teacher,
        None,
        RowTerms(divergence),
        vocab_map=mapping,
        row_weight=torch.tensor([1.0, 0.0, 1.0], device=DEVICE),
        grad=grad,
        config=SMALL,
    )
    assert kd.isnan().tolist() == [True, False, True]
    assert grad.isnan().any(1).tolist() == [True, False, True]


def compiled(student: Tensor, teacher: Tensor | TeacherTopK, labels: Tensor | None, **options) -> Tensor:
    """The loss in a graph, in which nobody reads values."""

    def loss(student: Tensor) -> Tensor:
        return kd_loss(student, teacher, labels, impl="torch", reduction="none", **options)

    return torch.compile(loss, backend="aot_eager")(student)


@pytest.mark.parametrize("bad", [11, -1, 1 << 40])
@pytest.mark.parametrize("divergence", [ForwardKL(), Decoupled()], ids=["forward_kl", "decoupled"])
@pytest.mark.parametrize("mode", [None, "fast", "low_memory"])
def test_labels_out_of_range_make_their_row_nan(mode: Mode | None, divergence: Divergence, bad: int) -> None:
    """Where they are not checked, they make the loss and the gradient of their row NaN, and of no other."""
    labels = torch.tensor([3, bad, -100, 0])
    teacher = torch.randn(4, 11)
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none", "impl": "torch"}
    options["ce_weight"] = 0.0 if isinstance(divergence, Decoupled) else 0.5

    def loss(student: Tensor) -> Tensor:
        if mode is None:
            return kd_loss(student, teacher, labels, **options)
        return linear_kd_loss(
            student, torch.eye(11), teacher, labels, mode=mode, static_shapes=True, **options
        )

    student = torch.randn(4, 11, requires_grad=True)
    rows = torch.compile(loss, backend="aot_eager")(student)
    assert rows.isnan().tolist() == [False, True, False, False] and rows[2] == 0.0
    rows.sum().backward()
    assert student.grad is not None
    assert student.grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", [11, -1, 1 << 40])
def test_ids_of_a_top_k_out_of_range_are_not_read(bad: int) -> None:
    student = torch.randn(3, 11, requires_grad=True)
    logprobs, indices = torch.randn(3, 11).log_softmax(-1).topk(4)
    indices[1, 2] = bad
    loss = compiled(student, TeacherTopK(logprobs, indices), None)
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [11, -1, 1 << 40])
def test_labels_out_of_range_are_not_read(bad: int) -> None:
    student, labels = torch.randn(3, 11), torch.tensor([3, bad, 10])
    loss = compiled(student, torch.randn(3, 11), labels, kd_weight=0.0, ce_weight=1.0)
    assert loss.isnan().tolist() == [False, True, False]


def test_graphs_are_cut_at_a_loss() -> None:
    """The host reads how many rows count: `mode="reduce-overhead"` must not capture it."""
    student = torch.randn(2, 5, requires_grad=True)
    compiled(student, torch.randn(2, 5), None).sum().backward()
    for name in ("row_loss", "row_gradients"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.kdkernels, name).default.tags


# One line per kernel and pointer whose alignment compiles another kernel.
SPECIALISED = """
import json
from kdkernels._triton import directions, projection
from kdkernels._triton.kd import rows, softmax, tiles
kernels = [rows._kd_rows_kernel, tiles._tile_kernel, softmax._row_statistics_kernel, softmax._softmax_gradient_kernel,
           projection._mse_rows_kernel, directions._direction_rows_kernel]
print(json.dumps({kernel.fn.__name__: [p.name for p in kernel.params if p.name.endswith("_ptr")
                  and not p.do_not_specialize_on_alignment] for kernel in kernels}))
"""


def test_slices_of_numbers_per_row_compile_nothing_again() -> None:
    """Only pointers to whole rows, a head's bias and a map are compiled for their alignment: those stay where they are."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    found = subprocess.run(
        [sys.executable, "-c", SPECIALISED], env=environment, capture_output=True, text=True, check=True
    )
    kernels = json.loads(found.stdout)
    rows = {
        "student_ptr",
        "teacher_ptr",
        "grad_ptr",
        "logits_ptr",
        "prediction_ptr",
        "target_ptr",
        "grad_target_ptr",
    }
    rows |= {"student_bias_ptr", "teacher_bias_ptr", "bias_ptr", "map_ptr"}
    assert len(kernels) == 6
    for name, pointers in kernels.items():
        # `target_ptr` is a row of features there, and a weight of each row here.
        allowed = rows - {"target_ptr"} if name in ("_kd_rows_kernel", "_tile_kernel") else rows
        assert set(pointers) <= allowed, name


def test_gradients_over_other_numbers_of_the_row_are_refused() -> None:
    """A kernel that writes while it reads may write over what it has read, and over nothing else."""
    memory = torch.randn(3, 132, device=DEVICE)
    target = torch.randn(3, 128, device=DEVICE)
    with pytest.raises(ValueError, match="must start where they do; got a start 16 bytes after theirs"):
        mse_rows(memory[:, :128], target, grad=memory.view(torch.bfloat16)[:, 8:136], config=SMALL)
    beside = torch.randn(3, 256, device=DEVICE)  # columns of one buffer, none of them shared
    mse_rows(beside[:, :128], target, grad=beside[:, 128:], config=SMALL)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_atomic_additions_beside_deterministic_algorithms(impl) -> None:
    student = torch.randn(1, 1, 6, 8, device=DEVICE, requires_grad=True)
    teacher = torch.randn(1, 1, 6, 8, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        if impl == "triton":
            with pytest.raises(RuntimeError, match="use impl='torch' or angle_weight=0"):
                contextual_relation_loss(student, teacher, window=1, impl=impl).backward()
            torch.use_deterministic_algorithms(True, warn_only=True)
            with pytest.warns(UserWarning, match="adds the neighbours"):
                contextual_relation_loss(student, teacher, window=1, impl=impl).backward()
        else:
            contextual_relation_loss(student, teacher, window=1, impl=impl).backward()
    finally:
        torch.use_deterministic_algorithms(False)
