"""The host waits for the device once, to read how many rows count, and never with static shapes; then a CUDA graph holds
the whole step. Needs a GPU."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kdkernels import kd_loss, linear_kd_loss, projection_mse
from kdkernels.options import Impl
from tests.support.inputs import FAST_IMPLS, make_case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _warned_once() -> Iterator[None]:
    """torch says once a process that this mode is a prototype: before what counts warnings, or takes them for errors."""
    with warnings.catch_warnings(action="ignore"):
        torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_static_shapes_never_wait(reduction, dtype, impl: Impl) -> None:
    case = make_case(dtype=dtype)
    hidden, weight, bias = case.leaves()
    logits = case.student_logits.detach().requires_grad_()
    mask = case.labels != -100
    items = torch.tensor(9, device="cuda")
    options = {"ce_weight": 0.5, "temperature": 2.0, "reduction": reduction, "impl": impl}
    if reduction == "mean":
        options["num_items_in_batch"] = items

    def step() -> None:
        linear = linear_kd_loss(
            hidden, weight, case.teacher, case.labels, student_bias=bias, static_shapes=True, **options
        )
        plain = kd_loss(logits, case.teacher_logits, case.labels, **options)
        features = projection_mse(hidden, case.teacher_hidden[:, :8], mask=mask, impl=impl)
        (linear.sum() + plain.sum() + features).backward()

    step()  # compiles kernels and starts libraries, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_compaction_waits_once(impl: Impl) -> None:
    case = make_case()
    hidden, weight, _ = case.leaves()

    def step() -> None:
        linear_kd_loss(hidden, weight, case.teacher, case.labels, impl=impl).backward()

    step()
    with pytest.warns(UserWarning, match="synchroniz") as waits:
        torch.cuda.set_sync_debug_mode("warn")
        step()
    assert len(waits) == 1, [str(wait.message) for wait in waits]


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_capture_in_a_cuda_graph(impl: Impl) -> None:
    """Loss and gradients of new inputs by replaying a captured step."""
    case = make_case()
    hidden, weight, _ = case.leaves()
    labels = case.labels.clone()

    def step() -> tuple[Tensor, ...]:
        loss = linear_kd_loss(
            hidden, weight, case.teacher, labels, ce_weight=0.5, static_shapes=True, impl=impl
        )
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(0.5)
        labels.copy_(labels.roll(1))
    graph.replay()
    for replayed, fresh in zip(captured, step(), strict=True):
        torch.testing.assert_close(replayed, fresh)
