"""Which layer of the student meets which layer of the teacher."""

from kdtrain.errors import KdtrainError

Pairs = tuple[tuple[int, int], ...]


def layer_pairs(layer_map: Pairs, student_layers: int, teacher_layers: int) -> Pairs:
    """The pairs asked for, or student layer i with teacher layer round(i * teacher / student), i = 1, 2, ..."""
    if not layer_map:
        return tuple(
            (i, max(1, round(i * teacher_layers / student_layers))) for i in range(1, student_layers + 1)
        )
    check_layer_map(layer_map, student_layers, teacher_layers)
    return layer_map


def check_layer_map(layer_map: Pairs, student_layers: int, teacher_layers: int) -> None:
    """Refuse layers that do not exist."""
    for pair in layer_map:
        for layer, layers, side in zip(
            pair, (student_layers, teacher_layers), ("student", "teacher"), strict=True
        ):
            if not 1 <= layer <= layers:
                raise KdtrainError(
                    f"method.layer_map holds {list(pair)}, but the {side} has layers 1 to {layers}"
                )


def all_but_the_last(pairs: Pairs) -> Pairs:
    """Leave out the topmost pair; a student of one layer has no other, and keeps it."""
    return pairs[:-1] or pairs
