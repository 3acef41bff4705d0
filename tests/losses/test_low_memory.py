"""`mode="low_memory"`: the same numbers from tiles of the vocabulary."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdkernels import Decoupled, Renyi, TeacherHead, TeacherTopK, linear_kd_loss
from kdkernels.logits.by_vocabulary import tile_shape
from kdkernels.options import Impl
from tests.support.budget import assert_within_budget
from tests.support.inputs import (
    DEVICE,
    FAST_IMPLS,
    TILED,
    loss_and_gradients,
    make_case,
    true_linear_kd,
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 rows, tiles of 16 columns: the 67 columns of a case are four tiles and a ragged fifth."""
    monkeypatch.setattr("kdkernels.logits.by_vocabulary.TILE_ROWS", 4)
    monkeypatch.setattr("kdkernels.logits.by_vocabulary.MIN_COLUMNS", 16)
    for name in ("TILE_BYTES", "GPU_TILE_BYTES"):
        monkeypatch.setattr(f"kdkernels.logits.by_vocabulary.{name}", 8 * 4 * 16)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.5, 0.7)])
@pytest.mark.parametrize("divergence", [*TILED, Decoupled(1.0, 2.0)], ids=repr)
@pytest.mark.interpreted(5)
def test_values_and_gradients(divergence, temperature, ce_weight, impl: Impl) -> None:
    case = make_case()
    options = {
        "divergence": divergence, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": 0.1
    }  # fmt: skip
    truth = true_linear_kd(case, case.labels, **options)
    loss, *gradients = loss_and_gradients(case, case.labels, impl, mode="low_memory", **options)
    assert_within_budget(loss, truth[1], "mean")
    for name, ours, exact in zip(("hidden", "weight", "bias"), gradients, truth[2:], strict=True):
        assert_within_budget(ours, exact, name)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", [TILED[0], TILED[2]], ids=repr)
def test_half_precision(divergence, dtype, impl: Impl) -> None:
    case = make_case(dtype=dtype)
    options = {"divergence": divergence, "ce_weight": 0.5}
    truth = true_linear_kd(case, case.labels, **options)
    _, *gradients = loss_and_gradients(case, case.labels, impl, mode="low_memory", **options)
    for ours, exact in zip(gradients, truth[2:], strict=True):
        assert ours.dtype == dtype
        assert_within_budget(ours, exact, "gradient")


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
# The student's ids reach further than the teacher's, and the other way round; stored logits and a head.
@pytest.mark.parametrize("teacher_vocabulary", [40, 80])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.interpreted(3)
def test_equals_the_fast_mode(stored, teacher_vocabulary, reduction, static_shapes, impl: Impl) -> None:
    case = make_case()
    head = torch.randn(teacher_vocabulary, 12, device=DEVICE)
    teacher: TeacherHead | Tensor = TeacherHead(case.teacher_hidden, head, softcap=3.0)
    if stored:
        teacher = case.teacher_hidden @ head.t()
    hidden, weight, bias = case.leaves()
    with torch.no_grad():
        hidden[case.labels == -100] = float("nan")
    token_weight = torch.rand(13, device=DEVICE)
    upstream = torch.rand(13, device=DEVICE) if reduction == "none" else torch.tensor(0.7, device=DEVICE)
    results = []
    for mode in ("fast", "low_memory"):
        loss = linear_kd_loss(
            hidden, weight, teacher, case.labels, student_bias=bias, mode=mode, reduction=reduction,
            static_shapes=static_shapes, token_weight=token_weight, vocab_map="shared_prefix", divergence="jsd",
            temperature=2.0, ce_weight=0.5, softcap=4.0, logit_scale=0.8, impl=impl,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), upstream)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_label_that_is_not_shared(impl: Impl) -> None:
    case = make_case(ignored_every=None)
    case = replace(case, labels=case.labels.fill_(60))
    teacher = TeacherHead(case.teacher_hidden, case.teacher_weight[:40])
    options = {"divergence": Decoupled(2.0, 3.0), "vocab_map": "shared_prefix", "impl": impl}
    arguments = (case.student_hidden, case.student_weight, teacher, case.labels)
    torch.testing.assert_close(
        linear_kd_loss(*arguments, mode="low_memory", **options), linear_kd_loss(*arguments, **options)
    )


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("divergence", [case for case in TILED if "Reverse" not in repr(case)][:3], ids=repr)
def test_infinities_and_large_logits(divergence, impl: Impl) -> None:
    """-inf where both sides have it, over a whole tile too, and logits far from 0."""
    student, head = torch.randn(5, 8, device=DEVICE), torch.randn(67, 8, device=DEVICE) * 30
    teacher = torch.randn(5, 67, device=DEVICE) + 500.0
    bias = torch.zeros(67, device=DEVICE)
    bias[16:33] = -torch.inf
    teacher[:, 16:33] = -torch.inf
    student.requires_grad_()
    results = []
    for mode in ("fast", "low_memory"):
        loss = linear_kd_loss(
            student, head, teacher, student_bias=bias, mode=mode, divergence=divergence, impl=impl
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for one, other in zip(*results, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5)


# Either side may have the wider head.
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float64], ids=str)
def test_heads_of_two_dtypes(student_dtype: torch.dtype) -> None:
    case = make_case(dtype=torch.float64)
    other = torch.float32 if student_dtype == torch.float64 else torch.float64
    student = (case.student_hidden.to(student_dtype), case.student_weight.to(student_dtype))
    teacher = TeacherHead(case.teacher_hidden.to(other), case.teacher_weight.to(other))
    fast, low = (
        linear_kd_loss(*student, teacher, impl="torch", mode=mode) for mode in ("fast", "low_memory")
    )
    assert low.dtype == student_dtype
    torch.testing.assert_close(low, fast, rtol=1e-5, atol=1e-6)


def test_tile_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the sizes of the module itself
    host, device = torch.device("cpu"), torch.device("cuda")
    # At the reference shape two float32 buffers of 1024 x 8192 on a CPU: 67 MB; eight times as many columns on a GPU, in
    # tiles of equal size.
    assert tile_shape(8192, 128256, None, host) == (1024, 8016)
    assert tile_shape(8192, 128256, None, device) == (1024, 64128)
    assert tile_shape(8192, 128256, 1 << 26, device) == (1024, 8016)
    assert tile_shape(1030, 128256, 1 << 26, device) == (640, 12832)
    assert tile_shape(100, 50, 1 << 26, host) == (100, 50)
    assert tile_shape(8192, 128256, 1 << 20, host) == (128, 1024)
    assert tile_shape(8192, 128256, 1, host) == (1, 1)


def test_refusals() -> None:
    case = make_case()
    top_k = TeacherTopK(*case.teacher_logits.log_softmax(-1).topk(4))
    for name, changes in (
        ("TeacherTopK", {"teacher": top_k}),
        ("return_stats=True", {"return_stats": True}),
        ("an index tensor as vocab_map", {"vocab_map": torch.arange(67, device=DEVICE)}),
    ):
        arguments = {"teacher": case.teacher, **changes}
        with pytest.raises(NotImplementedError) as caught:
            linear_kd_loss(case.student_hidden, case.student_weight, mode="low_memory", **arguments)
        sentence = (
            f"{name} is not supported yet with mode='low_memory'; use mode='fast', with a small chunk_bytes"
        )
        assert str(caught.value) == sentence
    with pytest.raises(NotImplementedError) as caught:
        linear_kd_loss(
            case.student_hidden, case.student_weight, case.teacher, mode="low_memory", divergence=Renyi(0.5)
        )
    assert str(caught.value) == (
        "Renyi(alpha=0.5) is not supported with mode='low_memory': its value is no sum over tiles of the vocabulary; "
        "use mode='fast' without a vocab_group"
    )
