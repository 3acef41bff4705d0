"""The checks of a teacher: by itself, with its student, with the divergence, with the head of a cross-term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..core.checks import (
    check_choice,
    check_device,
    check_frozen,
    check_head,
    check_integers,
    check_number,
    check_per_row,
    check_tensor,
    shape_of,
)
from ..core.compiling import values_can_be_read
from ..divergences import Decoupled, Divergence, ForwardKL
from ..options import RowTerms
from ..teachers import (
    CheckedTeacher,
    FullTeacher,
    Tail,
    Teacher,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
)
from .option_checks import check_transform

# What the top-k probabilities of a row may sum to at most: rounding log-probabilities of -12 to bfloat16 changes a
# probability by 2.4 %, rounding the normaliser of a log_softmax in bfloat16 by as much again.
MAX_TOP_K_PROB = 1.05


@dataclass(frozen=True)
class TeacherFacts:
    """What the checks of a teacher against its student need: the tensor that has its rows, and its vocabulary."""

    name: str
    rows: Tensor
    vocabulary: int | None


def check_teacher(teacher: Teacher, same_dtype: bool) -> CheckedTeacher:
    """One of the forms, with frozen tensors that fit together."""
    if isinstance(teacher, Tensor):
        teacher = TeacherLogits(teacher)
    if isinstance(teacher, TeacherTopK):
        _check_top_k(teacher)
    elif isinstance(teacher, TeacherCrossTerm):
        _check_cross_term(teacher)
    elif isinstance(teacher, TeacherLogits):
        logits = check_tensor("teacher logits", teacher.logits)
        if logits.dim() < 2 or logits.shape[-1] == 0:
            raise ValueError(
                f"teacher logits must have shape (..., V) with V above 0, got {shape_of(logits)}"
            )
        check_frozen("teacher logits", logits)
    elif isinstance(teacher, TeacherHead):
        check_transform("TeacherHead.", "scale", teacher.scale, teacher.softcap)
        check_head(
            "teacher",
            teacher.hidden,
            teacher.weight,
            teacher.bias,
            hidden_name="teacher hidden",
            weight_name="teacher weight",
            bias_name="teacher bias",
            same_dtype=same_dtype,
        )
        check_frozen("teacher hidden", teacher.hidden)
        check_frozen("teacher weight", teacher.weight)
        check_frozen("teacher bias", teacher.bias)
    else:
        raise ValueError(
            "teacher must be a tensor of logits, TeacherLogits, TeacherHead, TeacherTopK or TeacherCrossTerm, "
            f"got {type(teacher).__name__}"
        )
    return teacher


def _check_top_k(teacher: TeacherTopK) -> None:
    logprobs = check_tensor("TeacherTopK.logprobs", teacher.logprobs)
    if logprobs.dim() < 2 or logprobs.shape[-1] == 0:
        raise ValueError(
            f"TeacherTopK.logprobs must have shape (..., K) with K above 0, got {shape_of(logprobs)}"
        )
    check_frozen("TeacherTopK.logprobs", logprobs)
    indices = check_integers("TeacherTopK.indices", teacher.indices, "ids")
    if indices.shape != logprobs.shape:
        raise ValueError(
            "TeacherTopK.indices and .logprobs must have the same shape, got "
            f"{shape_of(indices)} and {shape_of(logprobs)}"
        )
    check_device("TeacherTopK.indices", indices, logprobs, "TeacherTopK.logprobs")
    check_choice("TeacherTopK.tail", teacher.tail, get_args(Tail))


def _check_cross_term(teacher: TeacherCrossTerm) -> None:
    cross = check_tensor("TeacherCrossTerm.cross", teacher.cross)
    for name, tensor in (("bias", teacher.bias), ("entropy", teacher.entropy)):
        check_per_row(
            f"TeacherCrossTerm.{name}",
            check_tensor(f"TeacherCrossTerm.{name}", tensor),
            "TeacherCrossTerm.cross",
            cross,
        )
        check_frozen(f"TeacherCrossTerm.{name}", tensor)
    check_frozen("TeacherCrossTerm.cross", cross)


def _facts(teacher: CheckedTeacher) -> TeacherFacts:
    if isinstance(teacher, TeacherHead):
        return TeacherFacts("teacher hidden", teacher.hidden, teacher.weight.shape[0])
    if isinstance(teacher, TeacherLogits):
        return TeacherFacts("teacher logits", teacher.logits, teacher.logits.shape[-1])
    if isinstance(teacher, TeacherTopK):
        return TeacherFacts("TeacherTopK.logprobs", teacher.logprobs, None)
    return TeacherFacts("TeacherCrossTerm.cross", teacher.cross, None)


def check_pair(
    student_name: str,
    student: Tensor,
    student_vocabulary: int,
    teacher: CheckedTeacher,
    vocab_map: object,
) -> int | Tensor | None:
    """Student and teacher have the same rows and device, and vocabularies that `vocab_map` relates.

    The map as the back ends take it: None for one vocabulary, the number of shared first ids, or an index tensor.
    """
    facts = _facts(teacher)
    if facts.rows.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{student_name} and {facts.name} must have the same rows, got shapes "
            f"{shape_of(student)} and {shape_of(facts.rows)}"
        )
    check_device(facts.name, facts.rows, student, student_name)
    if facts.vocabulary is None:
        if vocab_map is not None:
            raise ValueError(
                f"vocab_map does not go with {type(teacher).__name__}, whose ids are the student's; "
                "map the ids when the teacher's outputs are stored"
            )
        return None
    return _check_vocab_map(vocab_map, student_vocabulary, facts.vocabulary, student, student_name)


def check_ids(teacher: TeacherTopK, vocabulary: int) -> None:
    """On a CPU, ids in range and without repetition, and log-probabilities that may be some."""
    indices, logprobs = teacher.indices, teacher.logprobs
    if indices.shape[-1] > vocabulary:
        raise ValueError(
            f"TeacherTopK keeps {indices.shape[-1]} entries of a vocabulary of {vocabulary}; keep at most all"
        )
    if not values_can_be_read(indices) or indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"TeacherTopK.indices must be in [0, {vocabulary}), got {low if low < 0 else high}; "
            "an entry that was not kept has a logprob of -inf and any free id"
        )
    ordered = indices.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError("TeacherTopK.indices name an id twice in one row; each top-k entry needs its own")
    largest = float(logprobs.max())
    if largest > 1e-3:
        raise ValueError(
            f"TeacherTopK.logprobs must be log-probabilities, at most 0, got {largest:.4g}; "
            "take log_softmax over the whole vocabulary before the top k"
        )
    if teacher.tail == "bucket":
        total = float(logprobs.exp().sum(-1, dtype=torch.float64).max())
        if total > MAX_TOP_K_PROB:
            raise ValueError(
                f"the probabilities of a row of TeacherTopK sum to {total:.4g}, which leaves nothing for tail='bucket'; "
                "take log_softmax over the whole vocabulary before the top k"
            )


def _check_vocab_map(
    vocab_map: object, student_vocabulary: int, teacher_vocabulary: int, student: Tensor, student_name: str
) -> int | Tensor | None:
    if vocab_map is None:
        if student_vocabulary != teacher_vocabulary:
            raise ValueError(
                f"student and teacher must have the same vocabulary, got {student_vocabulary} and "
                f"{teacher_vocabulary} entries; if the ids below {min(student_vocabulary, teacher_vocabulary)} mean "
                "the same tokens pass vocab_map='shared_prefix', else an index tensor"
            )
        return None
    if isinstance(vocab_map, str) and vocab_map == "shared_prefix":
        same = student_vocabulary == teacher_vocabulary
        return None if same else min(student_vocabulary, teacher_vocabulary)
    assert isinstance(vocab_map, Tensor)  # `check_vocab_map_kind` saw to it
    if vocab_map.shape != (student_vocabulary,):
        raise ValueError(
            f"vocab_map must have shape ({student_vocabulary},), one teacher id or -1 for each student id, "
            f"got {shape_of(vocab_map)}"
        )
    check_device("vocab_map", vocab_map, student, student_name)
    if values_can_be_read(vocab_map):
        used = vocab_map[vocab_map >= 0]
        if used.numel() == 0:
            raise ValueError("vocab_map shares no id; give at least one student id a teacher id")
        if int(used.max()) >= teacher_vocabulary or int(vocab_map.min()) < -1:
            worst = int(used.max()) if int(used.max()) >= teacher_vocabulary else int(vocab_map.min())
            raise ValueError(
                f"vocab_map must hold teacher ids in [0, {teacher_vocabulary}) or -1, got {worst}"
            )
        if int(torch.bincount(used).max()) > 1:
            twice = int(torch.bincount(used).argmax())
            raise ValueError(
                f"vocab_map names teacher id {twice} more than once; each may stand for one student id"
            )
    return vocab_map.long()


def check_divergence(
    divergence: Divergence,
    teacher: CheckedTeacher,
    labels: Tensor | None,
    student_name: str,
    student: Tensor,
) -> None:
    """The divergence has what it needs, and a value with this form of teacher."""
    if isinstance(teacher, TeacherTopK):
        _check_divergence_of_top_k(divergence, teacher)
    if isinstance(teacher, TeacherCrossTerm) and not isinstance(divergence, ForwardKL):
        raise ValueError(
            f"TeacherCrossTerm stands for forward_kl only, got {divergence!r}; "
            "use TeacherLogits, TeacherHead or TeacherTopK for it"
        )
    if not isinstance(divergence, Decoupled):
        return
    if labels is None:
        raise ValueError("Decoupled splits off the label's entry, but there are no labels; pass labels")
    for name, weight in (("target", divergence.target), ("non_target", divergence.non_target)):
        if not isinstance(weight, Tensor):
            check_number(f"Decoupled.{name}", weight)
            continue
        check_tensor(f"Decoupled.{name}", weight)
        check_per_row(f"Decoupled.{name}", weight, student_name, student)
        if weight.requires_grad:
            raise ValueError(f"Decoupled.{name} must not require grad; pass its .detach()")


def _check_divergence_of_top_k(divergence: Divergence, teacher: TeacherTopK) -> None:
    if isinstance(divergence, Decoupled):
        raise ValueError(
            "Decoupled needs the teacher's probability of the label, which a top k may not have kept; "
            "use TeacherLogits or TeacherHead"
        )
    if teacher.tail == "bucket":
        return
    if not divergence.properties.is_linear_without_teacher:
        raise ValueError(
            f"{divergence!r} cannot be used with TeacherTopK(tail='renormalize'): where the teacher's probability is 0 "
            "it is infinite, or not computable from the top-k entries; use tail='bucket'"
        )


def check_cross_term_head(
    teacher: object, terms: RowTerms, student_weight: Tensor, student_bias: Tensor | None
) -> None:
    """A cross-term stands for one frozen head, one temperature and logits that are linear in the hidden states."""
    if not isinstance(teacher, TeacherCrossTerm):
        return
    for name, tensor in (("student_weight", student_weight), ("student_bias", student_bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but a TeacherCrossTerm was computed with the head as it was; "
                "freeze the head, or use TeacherHead"
            )
    if teacher.cross.shape[-1] != student_weight.shape[1]:
        raise ValueError(
            f"TeacherCrossTerm.cross has width {teacher.cross.shape[-1]} but the student's head takes "
            f"{student_weight.shape[1]}; compute it with this head"
        )
    if teacher.temperature != terms.temperature:
        raise ValueError(
            f"TeacherCrossTerm was computed at temperature {teacher.temperature}, but the loss is at "
            f"{terms.temperature}; use one of them for both"
        )
    if terms.student_transform.softcap is not None:
        raise ValueError(
            "TeacherCrossTerm needs logits that are linear in the hidden states, but softcap is "
            f"{terms.student_transform.softcap}; use TeacherHead"
        )


def check_full_teacher(teacher: Tensor | TeacherLogits | TeacherHead) -> FullTeacher:
    """A teacher that has all of its logits."""
    checked = check_teacher(teacher, same_dtype=True)
    if isinstance(checked, TeacherLogits | TeacherHead):
        return checked
    raise ValueError(
        f"a cross-term is an average over the whole vocabulary, got {type(checked).__name__}; "
        "pass logits, TeacherLogits or TeacherHead"
    )


def check_averaged_head(
    student_weight: object, student_bias: object, vocabulary: int, teacher_rows: Tensor
) -> None:
    """A student's head (V, D_s) and bias (V,) for a teacher of that vocabulary."""
    weight = check_tensor("student_weight", student_weight)
    if weight.dim() != 2 or weight.shape[0] != vocabulary:
        raise ValueError(
            f"student_weight must have shape ({vocabulary}, D_s), one row per entry of the teacher's vocabulary, "
            f"got {shape_of(weight)}"
        )
    check_device("student_weight", weight, teacher_rows, "the teacher")
    if student_bias is None:
        return
    bias = check_tensor("student_bias", student_bias)
    if bias.shape != (vocabulary,):
        raise ValueError(f"student_bias must have shape ({vocabulary},), got {shape_of(bias)}")
    check_device("student_bias", bias, teacher_rows, "the teacher")
