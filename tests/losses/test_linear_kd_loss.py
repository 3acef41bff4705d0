"""`linear_kd_loss` against fp64, within the error that float32 has to expect, for every input dtype."""

import pytest
import torch

from kdkernels import JSD, AlphaBeta, Decoupled, ForwardKL, ReverseKL, linear_kd_loss
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import (
    DIVERGENCES,
    FAST_IMPLS,
    IMPLS,
    loss_and_gradients,
    make_case,
    true_linear_kd,
)

NAMES = ("hidden", "weight", "bias")


def assert_matches_eager(case_sizes, dtype, impl, *, labels=True, chunk_bytes=None, **options) -> None:
    """Values per row, the mean, and the three gradients stay within the budget."""
    case = make_case(dtype=dtype, **case_sizes)
    picked = case.labels if labels else None
    truth = true_linear_kd(case, picked, **options)
    loss, *gradients = loss_and_gradients(case, picked, impl, chunk_bytes=chunk_bytes, **options)
    rows = linear_kd_loss(
        case.student_hidden,
        case.student_weight,
        case.teacher,
        picked,
        student_bias=case.student_bias,
        impl=impl,
        reduction="none",
        chunk_bytes=chunk_bytes,
        **options,
    )
    assert_within_budget(rows, truth[0], "rows")
    assert_within_budget(loss, truth[1], "mean")
    for name, ours, exact in zip(NAMES, gradients, truth[2:], strict=True):
        assert ours.dtype == dtype
        assert_within_budget(ours, exact, f"gradient of {name}")


@pytest.mark.parametrize("impl", IMPLS)
# T=1 shares one softmax between divergence and cross entropy, T=2.5 needs two.
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.7), (2.5, 0.0), (2.5, 0.7)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.interpreted(5)
def test_every_term(divergence, temperature, ce_weight, impl: Impl) -> None:
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight, "kd_weight": 0.6}
    assert_matches_eager({}, torch.float32, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(0.5)], ids=repr)
def test_half_precision(divergence, dtype, impl: Impl) -> None:
    assert_matches_eager({}, dtype, impl, divergence=divergence, ce_weight=0.5)


@pytest.mark.parametrize("impl", IMPLS)
# Two classes, one row, a vocabulary wider than the rows are many, and more rows than classes.
@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 2), (1, 67), (3, 515), (22, 5)])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(0.3)], ids=repr)
@pytest.mark.interpreted(5)
def test_ragged_sizes(divergence, rows, vocabulary, impl: Impl) -> None:
    sizes = {"rows": rows, "vocabulary": vocabulary, "ignored_every": None}
    assert_matches_eager(sizes, torch.float32, impl, divergence=divergence, ce_weight=0.5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, Decoupled()], ids=repr)
def test_one_class_leaves_nothing_to_learn(divergence, impl: Impl) -> None:
    case = make_case(rows=5, vocabulary=1)
    loss, *gradients = loss_and_gradients(case, case.labels, impl, divergence=divergence, ce_weight=0.5)
    # Alpha-beta divides what is left of numbers near 1 by alpha beta.
    size = 1.0 / (divergence.alpha * divergence.beta) if isinstance(divergence, AlphaBeta) else 1.0
    assert abs(loss.item()) < 1e-6 * size
    for gradient in gradients:
        assert gradient.abs().max().item() < 1e-6


@pytest.mark.parametrize("impl", FAST_IMPLS)
# Bytes of two fp32 rows of 67 logits: chunks of 1, 3 and 4 of the 10 counted rows, the last one ragged.
@pytest.mark.parametrize("chunk_rows", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks(dtype, chunk_rows, impl: Impl) -> None:
    assert_matches_eager({}, dtype, impl, divergence=JSD(0.4), ce_weight=0.5, chunk_bytes=8 * 67 * chunk_rows)


def test_several_blocks_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch back end cuts a chunk into blocks of rows that fit into the cache."""
    monkeypatch.setattr("kdkernels._torch.sizes.BLOCK_ELEMENTS", 3 * 67)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "temperature": 1.5, "ce_weight": 0.5}
        assert_matches_eager({}, torch.float32, "torch", **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_labels_every_row_counts(impl: Impl) -> None:
    assert_matches_eager({}, torch.float32, impl, labels=False, divergence=ForwardKL())


@pytest.mark.parametrize("impl", IMPLS)
def test_teacher_logits_equal_teacher_head(impl: Impl) -> None:
    case = make_case(dtype=torch.float64).to(torch.float64 if impl != "triton" else torch.float32)
    hidden, weight, bias = case.leaves()
    results = []
    for teacher in (case.teacher, case.teacher_logits):
        loss = linear_kd_loss(hidden, weight, teacher, case.labels, student_bias=bias, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_axes_and_strides_do_not_matter(impl: Impl) -> None:
    case = make_case(rows=12)
    flat = linear_kd_loss(
        case.student_hidden,
        case.student_weight,
        case.teacher_logits,
        case.labels,
        impl=impl,
        reduction="none",
    )
    # Batch and sequence swapped in memory: (4, 3, .) views of tensors stored as (3, 4, .).
    hidden, logits, labels = (
        tensor.reshape(4, 3, *tensor.shape[1:]).transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in (case.student_hidden, case.teacher_logits, case.labels)
    )
    weight = case.student_weight.t().contiguous().t()
    strided = linear_kd_loss(hidden, weight, logits, labels, impl=impl, reduction="none")
    assert strided.shape == (4, 3)
    torch.testing.assert_close(strided.reshape(-1), flat)
    # The last axis of the teacher's logits strided too.
    columns = case.teacher_logits.t().contiguous().t()
    again = linear_kd_loss(
        case.student_hidden, case.student_weight, columns, case.labels, impl=impl, reduction="none"
    )
    torch.testing.assert_close(again, flat)


@pytest.mark.parametrize("impl", IMPLS)
def test_teacher_may_have_another_dtype(impl: Impl) -> None:
    case = make_case()
    teacher = case.to(torch.bfloat16).teacher
    expected = linear_kd_loss(
        case.student_hidden, case.student_weight, case.to(torch.bfloat16).to(torch.float32).teacher, impl=impl
    )
    actual = linear_kd_loss(case.student_hidden, case.student_weight, teacher, impl=impl)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_linear_and_then_keeps_float32(dtype, impl: Impl) -> None:
    case = make_case()
    device = case.student_hidden.device.type
    half = case.to(dtype)
    with torch.autocast(device, dtype=dtype):
        loss, *gradients = loss_and_gradients(case, case.labels, impl, ce_weight=0.5)
    expected, *expected_gradients = loss_and_gradients(half, half.labels, impl, ce_weight=0.5)
    assert loss.dtype == torch.float32
    # The biases stay float32 under autocast and are rounded in `half`, hence a step of the half dtype.
    step = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=step, atol=step)
    for ours, other in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, other.float(), rtol=step, atol=step * other.abs().max().item())
