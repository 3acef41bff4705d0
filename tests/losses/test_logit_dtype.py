"""`logit_dtype=torch.bfloat16`: logits rounded on purpose, everything else as it was."""

import pytest
import torch

from kdkernels import ForwardKL, TeacherTopK, linear_kd_loss
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import DIVERGENCES, FAST_IMPLS, eager_linear_kd, loss_and_gradients, make_case
from tests.support.rounding import truths


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES[:3], ids=repr)
def test_within_the_error_of_eager_bfloat16(divergence, impl: Impl) -> None:
    case = make_case(dtype=torch.bfloat16)
    options = {"divergence": divergence, "ce_weight": 0.5}
    wide = case.to(torch.float64)
    truth = truths(lambda: eager_linear_kd(wide, case.labels, **options), torch.finfo(torch.bfloat16).eps / 2)
    for chunk_bytes in (None, 8 * 67 * 3):
        loss, *gradients = loss_and_gradients(
            case, case.labels, impl, logit_dtype=torch.bfloat16, chunk_bytes=chunk_bytes, **options
        )
        assert_within_budget(loss, truth[1], "mean")
        for ours, exact in zip(gradients, truth[2:], strict=True):
            assert ours.dtype == torch.bfloat16
            assert_within_budget(ours, exact, "gradient")


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_the_logits_are_rounded(impl: Impl) -> None:
    case = make_case(dtype=torch.bfloat16)
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    exact = linear_kd_loss(*arguments, impl=impl)
    rounded = linear_kd_loss(*arguments, logit_dtype=torch.bfloat16, impl=impl)
    assert rounded.dtype == torch.float32
    assert 0.0 < abs(rounded.item() - exact.item()) < 0.02 * exact.item()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_top_k_teachers(impl: Impl) -> None:
    case = make_case(dtype=torch.bfloat16)
    teacher = TeacherTopK(*case.teacher_logits.float().log_softmax(-1).topk(5), tail="bucket")
    hidden, weight, bias = case.leaves()
    results = []
    for logit_dtype in (None, torch.bfloat16):
        loss = linear_kd_loss(
            hidden, weight, teacher, case.labels, student_bias=bias, logit_dtype=logit_dtype, impl=impl
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 0.03 * one.norm()


def test_refusals() -> None:
    case = make_case()
    arguments = (case.student_hidden, case.student_weight, case.teacher)
    with pytest.raises(
        ValueError, match=r"logit_dtype must be None, which is float32, or torch\.bfloat16, got"
    ):
        linear_kd_loss(*arguments, logit_dtype=torch.float16)
    with pytest.raises(ValueError) as caught:
        linear_kd_loss(*arguments, logit_dtype=torch.bfloat16)
    assert str(caught.value) == (
        "logit_dtype=torch.bfloat16 rounds the logits of torch.bfloat16 heads, but student_weight is torch.float32; "
        "leave it at None, or cast the heads or call the loss inside torch.autocast"
    )
    half = make_case(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"but teacher weight is torch\.float32"):
        linear_kd_loss(half.student_hidden, half.student_weight, case.teacher, logit_dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError) as caught:
        linear_kd_loss(
            half.student_hidden,
            half.student_weight,
            half.teacher,
            divergence=ForwardKL(),
            mode="low_memory",
            logit_dtype=torch.bfloat16,
        )
    assert str(caught.value) == "logit_dtype is not supported yet with mode='low_memory'; leave it at None"
    with pytest.raises(
        ValueError, match="impl='reference' has float32 logits; leave logit_dtype at None there"
    ):
        linear_kd_loss(*arguments, logit_dtype=torch.bfloat16, impl="reference")
