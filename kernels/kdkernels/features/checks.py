"""Checks of the arguments that only losses between inner layers have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_bool_mask, check_device, check_frozen, check_head, check_tensor, shape_of
from ..options import Project


def check_features(
    student: object, teacher: object, weight: object, bias: object, project: Project, *, same_dtype: bool
) -> None:
    """Student and teacher features (..., D_s), (..., D_t) and a projection between them."""
    student, teacher = check_tensor("student", student), check_tensor("teacher", teacher)
    if student.dim() < 2 or teacher.dim() < 2 or 0 in (student.shape[-1], teacher.shape[-1]):
        raise ValueError(
            "student and teacher must have shapes (..., D_s) and (..., D_t) with widths above 0, "
            f"got {shape_of(student)} and {shape_of(teacher)}"
        )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same rows, got shapes {shape_of(student)} and {shape_of(teacher)}"
        )
    check_device("teacher", teacher, student, "student")
    check_frozen("teacher", teacher)
    if weight is None:
        if bias is not None:
            raise ValueError("bias belongs to a projection, but weight is None; pass weight too or drop bias")
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"student and teacher have widths {student.shape[-1]} and {teacher.shape[-1]}; "
                "pass a weight that maps one onto the other"
            )
        return
    source, target = (student, teacher) if project == "student" else (teacher, student)
    shape = (target.shape[-1], source.shape[-1])
    weight = check_tensor("weight", weight)
    if weight.shape != shape:
        raise ValueError(
            f"weight must have shape {shape} to map the {project}'s width {shape[1]} onto {shape[0]}, "
            f"got {shape_of(weight)}"
        )
    check_head(
        project, source, weight, bias, hidden_name=project, weight_name="weight", bias_name="bias",
        same_dtype=same_dtype,
    )  # fmt: skip


def check_layer_pairs(
    student: Sequence[object], teacher: object, weight: object, bias: object
) -> list[tuple[Any, Any, Any, Any]]:
    """Several layer pairs of features: as many teachers as students, weights and biases for all or for each."""
    if not isinstance(teacher, list | tuple):
        raise ValueError(
            f"student is a list of {len(student)} layers but teacher is {type(teacher).__name__}; "
            "pass a list with one teacher layer per student layer"
        )
    if not student:
        raise ValueError("student is an empty list; pass at least one layer pair")
    columns: list[Sequence[Any]] = []
    for name, layers in (("teacher", teacher), ("weight", weight), ("bias", bias)):
        if not isinstance(layers, list | tuple):
            layers = [layers] * len(student)
        if len(layers) != len(student):
            raise ValueError(
                f"student has {len(student)} layers but {name} has {len(layers)}; pass one {name} per student layer"
            )
        columns.append(layers)
    return list(zip(student, *columns, strict=True))


def check_batch(student: object, teacher: object, mask: object) -> None:
    """Features (B, ...) of one batch on both sides, and a mask (B,) over its samples."""
    student, teacher = check_tensor("student", student), check_tensor("teacher", teacher)
    if student.dim() < 2 or teacher.dim() < 2:
        raise ValueError(
            f"student and teacher must have shape (B, ...), got {shape_of(student)} and {shape_of(teacher)}"
        )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            "student and teacher must hold the same samples, got batches of "
            f"{student.shape[0]} and {teacher.shape[0]}"
        )
    check_device("teacher", teacher, student, "student")
    check_frozen("teacher", teacher)
    check_bool_mask(mask, student, student.shape[:1], "sample")


def check_sequences(
    student: object,
    teacher: object,
    mask: object,
    *,
    same_width: bool = False,
    names: tuple[str, str] = ("student", "teacher"),
) -> Tensor:
    """Features (B, N, D) of the same positions on both sides; the mask (B, N), all True for None."""
    student, teacher = check_tensor(names[0], student), check_tensor(names[1], teacher)
    if student.dim() != 3 or teacher.dim() != 3 or 0 in (student.shape[2], teacher.shape[2]):
        raise ValueError(
            f"{names[0]} and {names[1]} must have shapes (B, N, D_s) and (B, N, D_t), "
            f"got {shape_of(student)} and {shape_of(teacher)}"
        )
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same batch and length, got shapes "
            f"{shape_of(student)} and {shape_of(teacher)}"
        )
    if same_width and student.shape[2] != teacher.shape[2]:
        raise ValueError(
            f"{names[0]} and {names[1]} have widths {student.shape[2]} and {teacher.shape[2]}; "
            "map one onto the other's width first"
        )
    check_device(names[1], teacher, student, names[0])
    check_frozen(names[1], teacher)
    check_bool_mask(mask, student, student.shape[:2], "position")
    if mask is None:
        return torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    assert isinstance(mask, Tensor)
    return mask


def check_relations(
    student_q: object, teacher_q: object, student_k: object, teacher_k: object, heads: object, mask: object
) -> tuple[int, int]:
    """Queries and keys of the same tokens on both sides; the relation heads of student and teacher."""
    check_sequences(student_q, teacher_q, mask, names=("student_q", "teacher_q"))
    student_q, teacher_q = check_tensor("student_q", student_q), check_tensor("teacher_q", teacher_q)
    if (student_k is None) != (teacher_k is None):
        given, missing = ("student_k", "teacher_k") if teacher_k is None else ("teacher_k", "student_k")
        raise ValueError(
            f"{given} is given but {missing} is not; pass both for query-key relations, neither for relations of one kind"
        )
    if student_k is not None:
        for side, query, key in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
            key = check_tensor(f"{side}_k", key)
            if key.shape != query.shape or key.dtype != query.dtype:
                raise ValueError(
                    f"{side}_q and {side}_k must have one shape and dtype, got {shape_of(query)} {query.dtype} and "
                    f"{shape_of(key)} {key.dtype}; repeat the keys of grouped-query attention once per query head"
                )
            check_device(f"{side}_k", key, query, f"{side}_q")
        assert isinstance(teacher_k, Tensor)
        check_frozen("teacher_k", teacher_k)
    counts = [
        count
        for count in (heads if isinstance(heads, tuple) else (heads, heads))
        if isinstance(count, int) and not isinstance(count, bool) and count > 0
    ]
    if len(counts) != 2 or (isinstance(heads, tuple) and len(heads) != 2):
        raise ValueError(
            f"heads must be a whole number above 0, or a pair of them for student and teacher, got {heads!r}"
        )
    for side, count, features in (("student", counts[0], student_q), ("teacher", counts[1], teacher_q)):
        if features.shape[2] % count:
            raise ValueError(
                f"heads must divide the width, but {count} does not divide the {side}'s {features.shape[2]}"
            )
    if max(counts) % min(counts):
        raise ValueError(
            f"of the two numbers of heads one must divide the other, got {counts[0]} for the student and {counts[1]} for "
            "the teacher; relation heads need not be the attention heads: choose one number for both"
        )
    return counts[0], counts[1]
