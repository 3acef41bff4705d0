"""Every refusal by its text: what was given, why it cannot be, what to do."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

import kdkernels
from kdkernels import (
    JSD,
    AlphaBeta,
    Decoupled,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
    projection_mse,
)
from tests.support.inputs import DEVICE, make_case


def linear(**changes: Any) -> torch.Tensor:
    """`linear_kd_loss` on a good case with some arguments changed."""
    case = make_case()
    arguments: dict[str, Any] = {
        "student_hidden": case.student_hidden,
        "student_weight": case.student_weight,
        "teacher": case.teacher,
        "labels": case.labels,
        "student_bias": case.student_bias,
    }
    return linear_kd_loss(**{**arguments, **changes})


def plain(**changes: Any) -> torch.Tensor:
    """`kd_loss` on a good case with some arguments changed."""
    case = make_case()
    arguments: dict[str, Any] = {
        "student_logits": case.student_logits,
        "teacher": case.teacher_logits,
        "labels": case.labels,
    }
    return kd_loss(**{**arguments, **changes})


def mse(**changes: Any) -> torch.Tensor:
    """`projection_mse` on good features with some arguments changed."""
    arguments: dict[str, Any] = {
        "student": torch.randn(5, 3, device=DEVICE),
        "teacher": torch.randn(5, 4, device=DEVICE),
        "weight": torch.randn(4, 3, device=DEVICE),
    }
    return projection_mse(**{**arguments, **changes})


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def refused(
    call: Callable[..., Any], sentence: str, kind: type[Exception] = ValueError, **changes: Any
) -> None:
    """The call raises exactly this sentence."""
    with pytest.raises(kind) as caught:
        call(**changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("call", [linear, plain])
def test_numbers(call) -> None:
    refused(call, "temperature must be above 0, got 0.0; 1.0 leaves the logits as they are", temperature=0.0)
    refused(
        call, "temperature must be above 0, got -2.0; 1.0 leaves the logits as they are", temperature=-2.0
    )
    refused(call, "temperature must be finite, got inf", temperature=float("inf"))
    refused(call, "temperature must be a plain number, got Tensor", temperature=torch.tensor(2.0))
    for number in (1e30, 1e-30):
        sentence = f"temperature must lie in [1e-06, 1e+06], where float32 holds its square, got {number:g}"
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
    names = "forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd"
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
        "num_items_in_batch gets no gradient; pass num_items_in_batch.detach()",
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
        ("impl", "reference", "takes the whole vocabulary; use impl='torch'"),
        ("mode", "low_memory", "is for one process; a slice is small, use mode='fast'"),
        ("return_stats", True, "is not supported yet; leave it at False"),
        ("check_finite", True, "looks at whole rows; leave it at False"),
    ):
        sentence = f"with vocab_group, {option}={value!r} {reason}"
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


def test_what_decoupled_needs() -> None:
    sentence = "Decoupled splits off the label's entry, but there are no labels; pass labels"
    refused(plain, sentence, labels=None, divergence=Decoupled())
    sentence = "Decoupled.target must have shape (13,) to go with student_logits (13, 67), got (12,)"
    refused(plain, sentence, divergence=Decoupled(zeros(12)))
    sentence = "Decoupled.non_target gets no gradient; pass it .detach()ed"
    refused(plain, sentence, divergence=Decoupled(1.0, zeros(13).requires_grad_()))
    refused(plain, "Decoupled.target must be finite, got nan", divergence=Decoupled(float("nan")))


def top_k(**changes: Any) -> TeacherTopK:
    """Four entries a row that fit `plain` and `linear`."""
    indices = torch.arange(4, device=DEVICE).expand(13, 4)
    return replace(TeacherTopK(torch.full((13, 4), -2.0, device=DEVICE), indices), **changes)


def test_top_k_teachers() -> None:
    indices = top_k().indices.clone()
    for sentence, teacher in (
        (
            "TeacherTopK.logprobs must have shape (..., K) with K above 0, got (13, 0)",
            top_k(logprobs=zeros(13, 0)),
        ),
        (
            "TeacherTopK.indices must be an int64 tensor of ids, got torch.float32",
            top_k(indices=zeros(13, 4)),
        ),
        (
            "TeacherTopK.indices and .logprobs must have the same shape, got (13, 4) and (13, 3)",
            top_k(logprobs=zeros(13, 3)),
        ),
        ("TeacherTopK.tail must be one of 'renormalize', 'bucket', got 'drop'", top_k(tail="drop")),
        (
            "TeacherTopK keeps 68 entries of a vocabulary of 67; keep at most all",
            TeacherTopK(zeros(13, 68), torch.arange(68, device=DEVICE).expand(13, 68)),
        ),
    ):
        refused(plain, sentence, teacher=teacher)
    refused(
        plain,
        "student_logits and TeacherTopK.logprobs must have the same rows, got shapes (13, 67) and (12, 4)",
        teacher=TeacherTopK(zeros(12, 4), indices[:12]),
    )
    refused(
        plain,
        "vocab_map does not go with TeacherTopK, whose ids are the student's; map the ids when the teacher's "
        "outputs are stored",
        teacher=top_k(),
        vocab_map="shared_prefix",
    )
    for divergence in (ReverseKL(), AlphaBeta(0.5, 0.3), AlphaBeta(0.0, 1.0)):
        sentence = (
            f"{divergence!r} is infinite or no sum over the kept entries where the teacher's probability is 0; "
            "use tail='bucket'"
        )
        refused(plain, sentence, teacher=top_k(), divergence=divergence)
    refused(
        plain,
        "Decoupled needs the teacher's probability of the label, which a top k may not have kept; "
        "use TeacherLogits or TeacherHead",
        teacher=top_k(),
        divergence=Decoupled(),
    )
    if DEVICE == "cpu":  # on a GPU looking would make the host wait
        high, twice = indices.clone(), indices.clone()
        high[3, 2], twice[3, 2] = 67, 1
        refused(
            plain,
            "TeacherTopK.indices must be in [0, 67), got 67; an entry that was not kept has a logprob of -inf and "
            "any free id",
            teacher=top_k(indices=high),
        )
        refused(
            plain,
            "TeacherTopK.indices name an id twice in one row; each kept entry needs its own",
            teacher=top_k(indices=twice),
        )
        refused(
            plain,
            "TeacherTopK.logprobs must be log-probabilities, at most 0, got 3; take log_softmax over the whole "
            "vocabulary before the top k",
            teacher=top_k(logprobs=torch.full((13, 4), 3.0)),
        )


def test_cross_terms() -> None:
    good = TeacherCrossTerm(zeros(13, 8), zeros(13), zeros(13), 2.0)
    refused(
        plain,
        "TeacherCrossTerm is a product with the student's head, which kd_loss does not see; use linear_kd_loss",
        teacher=good,
    )
    for sentence, changes in (
        (
            "TeacherCrossTerm stands for forward_kl only, got JSD(beta=0.5); "
            "use TeacherLogits, TeacherHead or TeacherTopK for it",
            {"divergence": "jsd"},
        ),
        (
            "TeacherCrossTerm was computed at temperature 2.0, but the loss is at 1.0; use one of them for both",
            {},
        ),
        (
            "TeacherCrossTerm needs logits that are linear in the hidden states, but softcap is 30.0; use TeacherHead",
            {"temperature": 2.0, "softcap": 30.0},
        ),
        (
            "student_weight requires grad, but a TeacherCrossTerm was computed with the head as it was; "
            "freeze the head, or use TeacherHead",
            {"temperature": 2.0, "student_weight": zeros(67, 8).requires_grad_()},
        ),
        (
            "TeacherCrossTerm.cross has width 9 but the student's head takes 8; compute it with this head",
            {"temperature": 2.0, "teacher": replace(good, cross=zeros(13, 9))},
        ),
    ):
        refused(linear, sentence, **{"teacher": good, "impl": "reference", **changes})


def test_heads_of_teachers() -> None:
    teacher = make_case().teacher
    refused(
        linear,
        "TeacherHead.softcap must be above 0, got -30.0; None leaves the logits uncapped",
        teacher=replace(teacher, softcap=-30.0),
    )
    refused(
        linear,
        "TeacherHead.scale must not be 0, which makes all logits equal; 1.0 leaves them",
        teacher=replace(teacher, scale=0.0),
    )


def test_a_teacher_that_requires_grad() -> None:
    end = (
        "requires grad, but the teacher is frozen here and would get no gradient; "
        "run the teacher under torch.no_grad(), or pass the tensor's .detach()"
    )
    teacher = make_case().teacher
    logits = zeros(13, 67).requires_grad_()
    refused(plain, f"teacher logits {end}", teacher=logits)
    refused(linear, f"teacher logits {end}", teacher=TeacherLogits(logits))
    for field in ("hidden", "weight", "bias"):
        live = replace(teacher, **{field: getattr(teacher, field).clone().requires_grad_()})
        refused(linear, f"teacher {field} {end}", teacher=live)
    refused(mse, f"teacher {end}", teacher=zeros(5, 4).requires_grad_())


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


def test_shapes_of_the_teacher() -> None:
    case = make_case()
    refused(
        linear,
        "student_hidden and teacher hidden must have the same rows, got shapes (13, 8) and (12, 12)",
        teacher=replace(case.teacher, hidden=zeros(12, 12)),
    )
    refused(
        plain,
        "student_logits and teacher logits must have the same rows, got shapes (13, 67) and (14, 67)",
        teacher=zeros(14, 67),
    )
    refused(
        plain,
        "student and teacher must have the same vocabulary, got 67 and 70 entries; if the ids below 67 mean "
        "the same tokens pass vocab_map='shared_prefix', else an index tensor",
        teacher=zeros(13, 70),
    )
    refused(
        linear,
        "teacher hidden has width 12 but teacher weight takes 5 (shapes (13, 12) and (67, 5)); "
        "pass the hidden states that enter the teacher head",
        teacher=TeacherHead(case.teacher_hidden, zeros(67, 5)),
    )
    refused(plain, "teacher logits must have shape (..., V) with V above 0, got (67,)", teacher=zeros(67))
    refused(
        plain,
        "teacher must be a tensor of logits, TeacherLogits, TeacherHead, TeacherTopK or TeacherCrossTerm, got str",
        teacher="bert",
    )


def test_shapes_of_labels_and_weights() -> None:
    sentence = "labels must have shape (13,) to go with student_logits (13, 67), got (12,)"
    refused(plain, sentence, labels=zeros(12, dtype=torch.int64))
    sentence = "token_weight must have shape (13,) to go with student_hidden (13, 8), got (13, 1)"
    refused(linear, sentence, token_weight=zeros(13, 1))
    refused(
        linear,
        "token_weight gets no gradient; pass token_weight.detach()",
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
        "labels must be in [0, 67) or equal to ignore_index, got 67 in 2 place(s), the first of them; "
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
        mse, "mask must have shape (5,) to go with student (5, 3), got (4,)", mask=zeros(4, dtype=torch.bool)
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
    from kdkernels import backends

    def missing(name: str, package: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
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
