"""The checks of features of several layers, as `contextual_relation_loss` takes them."""

from __future__ import annotations

from ...core.checks import (
    check_bool_mask,
    check_device,
    check_frozen,
    check_integer,
    check_tensor,
    shape_of,
)


def check_layer_features(student: object, teacher: object, mask: object) -> None:
    """Features of several layers (B, L, N, D_s) and (B, L, N, D_t), and a mask (B, N) of the tokens."""
    student, teacher = check_tensor("student", student), check_tensor("teacher", teacher)
    if student.dim() != 4 or teacher.dim() != 4 or 0 in (student.shape[-1], teacher.shape[-1]):
        raise ValueError(
            "student and teacher must have shapes (B, L, N, D_s) and (B, L, N, D_t) with widths above 0, "
            f"got {shape_of(student)} and {shape_of(teacher)}; stack the layers on axis 1"
        )
    for axis, name in enumerate(("batch", "number of layers", "length")):
        if student.shape[axis] != teacher.shape[axis]:
            raise ValueError(
                f"student and teacher must have the same {name}, got {student.shape[axis]} and "
                f"{teacher.shape[axis]} (shapes {shape_of(student)} and {shape_of(teacher)})"
            )
    check_device("teacher", teacher, student, "student")
    check_frozen("teacher", teacher)
    check_bool_mask(mask, student, (student.shape[0], student.shape[2]), "token")


def check_window(window: object) -> None:
    """A whole number of neighbours on either side."""
    check_integer("window", window)
    if not isinstance(window, int) or window < 1:
        raise ValueError(
            f"window must be at least 1, got {window}; it counts the neighbours on either side of a token"
        )
