"""Every refusal by its text: what was given, why it cannot be, what to do."""

import math
from typing import Any, cast

import pytest
import torch

import kdkernels
from kdkernels import JSD, AlphaBeta, SkewKL, SkewReverseKL, linear_kd_loss
from tests.support.inputs import DEVICE, make_case
from tests.support.refusals import linear, mse, plain, refused, zeros


@pytest.mark.parametrize("call", [linear, plain])
def test_numbers(call) -> None:
    refused(call, "temperature must be above 0, got 0.0; 1.0 leaves the logits as they are", temperature=0.0)
    refused(
        call, "temperature must be above 0, got -2.0; 1.0 leaves the logits as they are", temperature=-2.0
    )
    refused(call, "temperature must be finite, got inf", temperature=float("inf"))
    refused(call, "temperature must be a plain number, got Tensor", temperature=torch.tensor(2.0))
    for number in (100.5, 1e30, 1e-30):
        sentence = (
            "temperature must lie in [1e-06, 100], where T squared times a divergence has its digits in float32, "
            f"got {number:g}"
        )
        refused(call, sentence, temperature=number)
    refused(call, f"kd_weight must be finite, got {10**400}", kd_weight=10**400)
    refused(call, "kd_weight must be finite, got nan", kd_weight=float("nan"))
    refused(call, "ce_weight must be a plain number, got bool", ce_weight=True)
    refused(call, "ignore_index must be a whole number, got 1.5", ignore_index=1.5)
    refused(call, "t_squared must be True or False, got 2", t_squared=2)


@pytest.mark.parametrize("call", [linear, plain])
def test_choices(call) -> None:
    refused(call, "reduction must be one of 'mean', 'sum', 'none', got 'avg'", reduction="avg")
    refused(call, "impl must be one of 'triton', 'torch', 'reference', got 'cuda'", impl="cuda")
    names = "forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, chi_squared"
    refused(
        call, f"divergence must be one of {names} or an object such as JSD(0.3), got 'kl'", divergence="kl"
    )
    refused(call, f"divergence must be one of {names} or an object such as JSD(0.3), got 3", divergence=3)
    with pytest.raises(
        ValueError, match=r"JSD needs 0 < beta < 1, got 1\.0; at 0 and 1 the formula is constantly 0"
    ):
        JSD(1.0)


def test_num_items_in_batch() -> None:
    refused(
        linear,
        "num_items_in_batch is what a mean divides by, but reduction is 'sum'; "
        "use reduction='mean' or leave num_items_in_batch out",
        reduction="sum",
        num_items_in_batch=4,
    )
    for number in (-1, torch.tensor(-1)):
        refused(linear, "num_items_in_batch must not be negative, got -1", num_items_in_batch=number)
    refused(linear, "num_items_in_batch must be finite, got nan", num_items_in_batch=torch.tensor(math.nan))
    refused(
        linear,
        "num_items_in_batch must be a number or a 0-D tensor, got shape (2,)",
        num_items_in_batch=torch.ones(2),
    )
    refused(
        linear,
        "num_items_in_batch must not require grad; pass num_items_in_batch.detach()",
        num_items_in_batch=torch.tensor(2.0, requires_grad=True),
    )


@pytest.mark.parametrize("call", [linear, plain])
def test_new_numbers(call) -> None:
    refused(call, "label_smoothing must be in [0, 1), got 1.0", label_smoothing=1.0)
    refused(call, "label_smoothing must be in [0, 1), got -0.1", label_smoothing=-0.1)
    refused(call, "softcap must be above 0, got 0.0; None leaves the logits uncapped", softcap=0.0)
    refused(call, "logit_scale must not be 0, which makes all logits equal; 1.0 leaves them", logit_scale=0.0)
    refused(call, "return_stats must be True or False, got 1", return_stats=1)
    refused(call, "check_finite must be True or False, got 'yes'", check_finite="yes")


def test_modes() -> None:
    refused(linear, "mode must be one of 'fast', 'low_memory', got 'slow'", mode="slow")


def test_sharded_vocabularies() -> None:
    group: dict[str, Any] = {"vocab_group": "a process group"}
    refused(
        linear,
        "vocab_group must be a process group of torch.distributed, got str; "
        "pass torch.distributed.group.WORLD or what new_group returned",
        **group,
    )
    for option, value, reason in (
        ("impl", "reference", "the reference takes the whole vocabulary; use impl='torch'"),
        ("mode", "low_memory", "tiles are for one process; a shard is small, use mode='fast'"),
        ("return_stats", True, "no rank has whole rows; leave it at False"),
        ("check_finite", True, "no rank has whole rows; leave it at False"),
    ):
        sentence = f"{option}={value!r} is not supported with vocab_group: {reason}"
        refused(linear, sentence, NotImplementedError, **{**group, option: value})


def test_numbers_of_divergences() -> None:
    for make, sentence in (
        (
            lambda: SkewKL(0.0),
            "SkewKL needs 0 < alpha < 1, got 0.0; at 0 it is ForwardKL(), at 1 it is constantly 0",
        ),
        (
            lambda: SkewReverseKL(1.0),
            "SkewReverseKL needs 0 < alpha < 1, got 1.0; at 0 it is ReverseKL(), at 1 it is constantly 0",
        ),
        (lambda: JSD(cast(Any, torch.tensor(0.3))), "beta of JSD must be a plain number, got Tensor"),
        (lambda: SkewKL(cast(Any, "0.3")), "alpha of SkewKL must be a plain number, got str"),
        (lambda: AlphaBeta(0.5, cast(Any, None)), "beta of AlphaBeta must be a plain number, got NoneType"),
        (
            lambda: AlphaBeta(1e-3, 0.5),
            "AlphaBeta needs alpha to be 0 or at least 0.01 in size, got 0.001; 0 gives the limit, which is close",
        ),
        (
            lambda: AlphaBeta(0.5, -0.495),
            "AlphaBeta needs alpha + beta to be 0 or at least 0.01 in size, "
            f"got {0.5 - 0.495}; 0 gives the limit, which is close",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == sentence


def test_shapes_of_the_student() -> None:
    refused(
        linear, "student_hidden must have shape (..., D), got (8,); add a row axis", student_hidden=zeros(8)
    )
    refused(
        linear,
        "student_weight must have shape (V, D) with V and D above 0, got (67,)",
        student_weight=zeros(67),
    )
    refused(
        linear,
        "student_hidden has width 8 but student_weight takes 9 (shapes (13, 8) and (67, 9)); "
        "pass the hidden states that enter the student head",
        student_weight=zeros(67, 9),
    )
    refused(linear, "student_bias must have shape (67,), got (66,)", student_bias=zeros(66))
    refused(
        plain, "student_logits must have shape (..., V) with V above 0, got (67,)", student_logits=zeros(67)
    )


def test_shapes_of_labels_and_weights() -> None:
    sentence = "labels must have shape (13,) to go with student_logits (13, 67), got (12,)"
    refused(plain, sentence, labels=zeros(12, dtype=torch.int64))
    sentence = "token_weight must have shape (13,) to go with student_hidden (13, 8), got (13, 1)"
    refused(linear, sentence, token_weight=zeros(13, 1))
    refused(
        linear,
        "token_weight must not require grad; pass token_weight.detach()",
        token_weight=zeros(13).requires_grad_(),
    )
    refused(
        plain,
        "ce_weight is 0.5 but there are no labels; pass labels or set ce_weight=0.0",
        labels=None,
        ce_weight=0.5,
    )


def test_labels_out_of_range() -> None:
    labels = make_case().labels.masked_fill(make_case().labels == -100, 3)
    labels[4:6] = 67
    sentence = (
        "labels must be in [0, 67) or equal to ignore_index, got 67 (the first of 2 invalid labels); "
        "check the vocabulary and the padding of the labels"
    )
    refused(linear, sentence, labels=labels)
    if DEVICE == "cpu":  # on a GPU `kd_loss` would have to wait for the device to see it
        refused(plain, sentence, labels=labels)
    labels[4:6] = -1
    refused(linear, sentence.replace("got 67", "got -1"), labels=labels)


def test_dtypes() -> None:
    case = make_case()
    refused(linear, "student_hidden must be a tensor, got list", student_hidden=[1.0])
    refused(
        plain,
        "student_logits must be float16, bfloat16, float32 or float64, got torch.int64",
        student_logits=zeros(13, 67, dtype=torch.int64),
    )
    refused(
        linear,
        "student_hidden is torch.float32 and student_weight is torch.bfloat16; "
        "cast one of them, or call the loss inside torch.autocast",
        student_weight=case.student_weight.bfloat16(),
    )
    refused(plain, "labels must be an int64 tensor of class ids, got torch.float32", labels=zeros(13))
    refused(plain, "labels must be an int64 tensor of class ids, got list", labels=[1, 2])
    refused(
        mse,
        "mask must be a bool tensor, True where a row counts, got torch.int64; use mask.bool()",
        mask=zeros(5, dtype=torch.int64),
    )


def test_devices() -> None:
    meta = torch.empty(13, 67, device="meta")
    refused(
        plain,
        f"teacher logits is on meta and student_logits on {zeros(1).device}; move them to one device",
        teacher=meta,
    )


def test_sizes_of_chunks() -> None:
    refused(linear, "chunk_bytes must be above 0, got 0", chunk_bytes=0)
    refused(linear, "chunk_bytes must be a whole number, got 1.5", chunk_bytes=1.5)
    sentence = "chunk_bytes must be at least 536, two float32 rows of 67 logits, got 535; leave it at None for the default"
    for mode in ("fast", "low_memory"):
        refused(linear, sentence, chunk_bytes=535, mode=mode)
        assert linear(chunk_bytes=536, mode=mode).isfinite()
    case = make_case(vocabulary=300)
    refused(
        linear_kd_loss,
        "chunk_bytes must be at least 1024, two float32 rows of 128 logits, got 1; leave it at None for the default",
        student_hidden=case.student_hidden,
        student_weight=case.student_weight,
        teacher=case.teacher,
        mode="low_memory",
        chunk_bytes=1,
    )


def test_features() -> None:
    refused(mse, "project must be one of 'student', 'teacher', got 'both'", project="both")
    refused(
        mse,
        "student and teacher must have the same rows, got shapes (5, 3) and (6, 4)",
        teacher=zeros(6, 4),
    )
    refused(
        mse,
        "student and teacher must have shapes (..., D_s) and (..., D_t) with widths above 0, got (5, 3) and (4,)",
        teacher=zeros(4),
    )
    refused(
        mse,
        "student and teacher have widths 3 and 4; pass a weight that maps one onto the other",
        weight=None,
    )
    refused(
        mse,
        "bias belongs to a projection, but weight is None; pass weight too or drop bias",
        weight=None,
        bias=zeros(4),
    )
    refused(
        mse,
        "weight must have shape (3, 4) to map the teacher's width 4 onto 3, got (4, 3)",
        project="teacher",
    )
    refused(mse, "bias must have shape (4,), got (3,)", bias=zeros(3))
    refused(
        mse,
        "mask must have shape (5,), one entry for each row of student (5, 3), got (4,)",
        mask=zeros(4, dtype=torch.bool),
    )


def test_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        sentence = "impl='triton' needs CUDA or ROCm tensors, got tensors on cpu; use impl='torch' there"
        for call in (linear, plain, mse):
            refused(call, sentence, impl="triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case(dtype=torch.float64)
    refused(
        plain,
        "impl='triton' computes in float32 and would lose the digits of float64 inputs; "
        "use impl='torch' or impl='reference' for float64",
        impl="triton",
        student_logits=case.student_logits,
    )


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.core import backend

    def missing(name: str, package: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(backend.importlib, "import_module", missing)
    backend.load_backend.cache_clear()  # another test may have loaded it
    refused(
        linear,
        "impl='triton' needs the package triton, which is not installed; install it or use impl='torch'",
        ModuleNotFoundError,
        impl="triton",
    )


def test_public_names_have_docstrings() -> None:
    for name in kdkernels.__all__:
        thing = getattr(kdkernels, name)
        if callable(thing) and not hasattr(thing, "__args__"):
            assert thing.__doc__, name
