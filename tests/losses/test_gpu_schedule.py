"""The schedules as a GPU would run them, on tensors that report a CUDA device: dtypes of the GEMMs, roundings, bytes and launches."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import ForwardKL, TeacherHead, linear_kd_loss
from kdkernels.core.autograd import dtypes_of, finish
from kdkernels.core.backend import Backend
from kdkernels.core.matmul import full_float32
from kdkernels.logits.by_rows import LinearKD
from kdkernels.logits.inputs import Given
from kdkernels.options import RowTerms
from tests.support.fake_device import Device, Rows, Run

N, WIDTH, TEACHER_WIDTH, VOCABULARY = 96, 32, 64, 512
HALF, FLOAT = torch.bfloat16, torch.float32


def dtypes(facts: list[tuple[tuple[int, ...], torch.dtype]]) -> set[torch.dtype]:
    return {dtype for _, dtype in facts}


def linear_step(**options: Any) -> tuple[list[Run], list[Run]]:
    """What forward and backward of a bfloat16 head run."""
    hidden, head = torch.randn(N, WIDTH, dtype=HALF), torch.randn(VOCABULARY, WIDTH, dtype=HALF)
    teacher = TeacherHead(
        torch.randn(N, TEACHER_WIDTH, dtype=HALF), torch.randn(VOCABULARY, TEACHER_WIDTH, dtype=HALF)
    )
    given = Given(teacher, None, None, None)
    solver = LinearKD(RowTerms(ForwardKL()), cast(Backend, Rows), None, None, None, given.layout, **options)
    tensors = (hidden, head, None, *given.tensors)
    needs = tuple(tensor is hidden or tensor is head for tensor in tensors)
    with Device() as forward:
        _, gradients = solver.solve(tensors, torch.ones(N), needs)
    with Device() as backward:
        d_hidden, d_head, *_ = finish(gradients, torch.tensor(0.3), dtypes_of(tensors))
    assert d_hidden is not None and d_head is not None
    assert d_hidden.dtype == d_head.dtype == HALF
    return forward.runs, backward.runs


def test_every_gemm_writes_float32() -> None:
    """The gradient of the hidden states too: with V terms its GEMM may be split, and half-precision parts be added."""
    forward, _ = linear_step()
    written = [run.written[0] for run in forward if run.name in ("mm", "addmm")]
    assert written == [
        ((N, VOCABULARY), FLOAT),
        ((N, VOCABULARY), FLOAT),
        ((N, WIDTH), FLOAT),
        ((VOCABULARY, WIDTH), FLOAT),
    ]


def test_backward_scales_and_rounds_in_one_pass() -> None:
    """One operator per gradient, which reads float32 and writes the input's dtype: 6 bytes an element."""
    forward, backward = linear_step()
    large = [run for run in backward if any(len(shape) == 2 for shape, _ in run.written)]
    assert [run.name for run in large] == ["mul", "mul"]
    assert [run.bytes - 4 for run in large] == [6 * N * WIDTH, 6 * VOCABULARY * WIDTH]  # 4: the factor
    # No gradient was rounded before it was multiplied.
    assert [run for run in forward if HALF in dtypes(run.written) and HALF not in dtypes(run.read)] == []


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_heads_are_multiplied_in_float32(precision: str) -> None:
    """Also where the caller allows TF32 for GEMMs; the caller's setting is back afterwards, also after an error."""
    seen = []
    backends: Any = torch.backends

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                seen.append((backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision))
            return func(*args, **(kwargs or {}))

    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        allowed = torch.backends.cuda.matmul.fp32_precision
        with Watch():
            for reduction in ("mean", "none"):
                linear_kd_loss(hidden, head, torch.randn(4, 11), reduction=reduction).sum().backward()
        assert len(seen) == 3 + 4
        assert set(seen) == {("ieee", "ieee")}
        with pytest.raises(ZeroDivisionError), full_float32():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.fp32_precision == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_precisions_of_single_back_ends_are_kept() -> None:
    """What has no common name in `torch.get_float32_matmul_precision`."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    try:
        with full_float32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def compiled_roundings(upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The head's gradient by a compiled graph and in eager, bfloat16, for an upstream factor of 0.3."""
    hidden = torch.randn(64, 16).bfloat16()
    teacher = torch.randn(64, 40).bfloat16()
    head = torch.randn(40, 16).bfloat16().requires_grad_()

    def loss(head: Tensor) -> Tensor:
        return linear_kd_loss(hidden, head, teacher, impl="torch")

    compiled = torch.compile(loss, backend="aot_eager")
    (ours,), (eager,) = (torch.autograd.grad(one(head), head, upstream) for one in (compiled, loss))
    return ours, eager


def test_a_compiled_graph_rounds_gradients_once() -> None:
    ours, eager = compiled_roundings(torch.tensor(0.3))
    assert torch.equal(ours, eager)
