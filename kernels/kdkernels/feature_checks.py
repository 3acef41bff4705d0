"""Checks of the arguments that only losses between inner layers have."""

from __future__ import annotations

from collections.abc import Sequence


def check_layer_pairs(
    student: Sequence[object], teacher: object, weight: object, bias: object
) -> list[tuple[object, object, object, object]]:
    """Several layer pairs of features: as many teachers as students, weights and biases for all or for each."""
    if not isinstance(teacher, list | tuple):
        raise ValueError(
            f"student is a list of {len(student)} layers but teacher is {type(teacher).__name__}; "
            "pass a list with one teacher layer per student layer"
        )
    if not student:
        raise ValueError("student is an empty list; pass at least one layer pair")
    columns = []
    for name, layers in (("teacher", teacher), ("weight", weight), ("bias", bias)):
        if not isinstance(layers, list | tuple):
            layers = [layers] * len(student)
        if len(layers) != len(student):
            raise ValueError(
                f"student has {len(student)} layers but {name} has {len(layers)}; pass one {name} per student layer"
            )
        columns.append(layers)
    return list(zip(student, *columns, strict=True))
