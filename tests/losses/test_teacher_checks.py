"""Every refusal of a teacher by its text, and of what a divergence needs beside it."""

import math
from dataclasses import replace
from typing import Any

import torch

from kdkernels import (
    AlphaBeta,
    Decoupled,
    ReverseKL,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
)
from tests.support.inputs import DEVICE, make_case
from tests.support.refusals import linear, mse, plain, refused, zeros


def test_what_decoupled_needs() -> None:
    sentence = "Decoupled splits off the label's entry, but there are no labels; pass labels"
    refused(plain, sentence, labels=None, divergence=Decoupled())
    sentence = "Decoupled.target must have shape (13,) to go with student_logits (13, 67), got (12,)"
    refused(plain, sentence, divergence=Decoupled(zeros(12)))
    sentence = "Decoupled.non_target must not require grad; pass its .detach()"
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
            f"{divergence!r} cannot be used with TeacherTopK(tail='renormalize'): where the teacher's probability is 0 "
            "it is infinite, or not computable from the top-k entries; use tail='bucket'"
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
            "TeacherTopK.indices name an id twice in one row; each top-k entry needs its own",
            teacher=top_k(indices=twice),
        )
        refused(
            plain,
            "TeacherTopK.logprobs must be log-probabilities, at most 0, got 3; take log_softmax over the whole "
            "vocabulary before the top k",
            teacher=top_k(logprobs=torch.full((13, 4), 3.0)),
        )
        refused(
            plain,
            "the probabilities of a row of TeacherTopK sum to 3, which leaves nothing for tail='bucket'; take log_softmax "
            "over the whole vocabulary before the top k",
            teacher=top_k(logprobs=torch.tensor([0.0, 0.0, 0.0, -math.inf]).expand(13, 4), tail="bucket"),
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
