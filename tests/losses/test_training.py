"""The losses inside what training loops wrap around them: loss scaling, activation checkpointing, sharded parameters."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

from kdkernels import LinearKDLoss, TeacherHead, linear_kd_loss
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS, make_case


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_grad_scaler_steps_as_without_it(impl: Impl) -> None:
    """One step of SGD with the loss multiplied by 2**14 and its gradients divided again."""
    case = make_case()
    results = []
    for scale in (None, 2.0**14):
        weight = nn.Parameter(case.student_weight.detach().clone())
        optimizer = torch.optim.SGD([weight], lr=0.5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale or 1.0, enabled=scale is not None)
        loss = linear_kd_loss(
            case.student_hidden, weight, case.teacher, case.labels, ce_weight=0.5, impl=impl
        )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0], case.student_weight)


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    case = make_case()
    weight = nn.Parameter(case.student_weight.detach().clone())
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=float("inf"))
    scaler.scale(linear_kd_loss(case.student_hidden, weight, case.teacher, case.labels)).backward()
    scaler.step(optimizer)
    assert torch.equal(weight, case.student_weight)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, impl: Impl) -> None:
    """Body and loss recomputed in backward, in both ways that torch has."""
    case = make_case()
    body = nn.Linear(case.student_hidden.shape[1], case.student_hidden.shape[1], device=DEVICE)
    loss = LinearKDLoss(divergence="jsd", temperature=2.0, ce_weight=0.5, impl=impl)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(body(hidden).tanh(), weight, case.teacher, case.labels)

    results = []
    for checkpointed in (False, True):
        hidden, weight, _ = case.leaves()
        value = (
            checkpoint(step, hidden, weight, use_reentrant=reentrant)
            if checkpointed
            else step(hidden, weight)
        )
        assert isinstance(value, Tensor)
        value.backward()
        results.append((value.detach(), hidden.grad, weight.grad))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_sharded_parameter_is_refused(tmp_path) -> None:
    """Outside of the wrapped forward FSDP2's parameters are slices; taken as wholes they would give a wrong loss."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        case = make_case()
        weight = DTensor.from_local(case.student_weight.detach().cpu(), mesh, [Replicate()])
        hidden = case.student_hidden.detach().cpu()
        teacher = TeacherHead(case.teacher.hidden.detach().cpu(), case.teacher.weight.detach().cpu())
        with pytest.raises(ValueError, match="student_weight is a DTensor, of which each rank holds a part"):
            linear_kd_loss(hidden, weight, teacher)
    finally:
        torch.distributed.destroy_process_group()
