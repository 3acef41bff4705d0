"""Contextual distillation (Park et al., EMNLP 2021) in the form of arXiv 2508.15423: relations instead of states."""

from typing import ClassVar

from torch import Tensor

from kdkernels import contextual_relation_loss
from kdtrain.errors import KdtrainError
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.layers import layer_pairs
from kdtrain.models import Shape
from kdtrain.objective import Batch
from kdtrain.recipe import MethodRecipe


class ContextualDistillation(LogitDistillation):
    """The terms of kd, and `feature_weight * (WR + layer_weight * LTR)` over whole sequences.

    WR compares distances and angles between neighbouring tokens of a layer, LTR those between the matched layers of a
    token; widths may differ, nothing is projected. Each row counts the same. A Transformer student also matches
    the embeddings; a BiGRU has none of its width. Tokens are compared place by place, up to the end of
    the shorter of the two rows of tokens; padding is never read.
    """

    whole_sequences: ClassVar[bool] = True

    def __init__(self, recipe: MethodRecipe, student: Shape, teacher: Shape | None) -> None:
        super().__init__(recipe, student, teacher)
        assert teacher is not None
        if not teacher.embeddings:
            raise KdtrainError(
                "method ckd compares the teacher token by token and needs a Transformer teacher"
            )
        pairs = layer_pairs(recipe.layer_map, student.layers, teacher.layers)
        if not recipe.layer_map and student.embeddings:
            pairs = ((0, 0), *pairs)
        self.student_layers = tuple(pair[0] for pair in pairs)
        self.teacher_layers = tuple(pair[1] for pair in pairs)
        self.weights["relation"] = recipe.feature_weight

    def terms(self, logits: Tensor, states: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """kd, ce and relation."""
        assert states is not None and batch.teacher_states is not None and batch.teacher_mask is not None
        length = min(states.shape[2], batch.teacher_states.shape[2])
        student_mask = batch.attention_mask.reshape(len(states), -1)[:, :length].bool()
        mask = student_mask & batch.teacher_mask[:, :length].bool()
        relation = logits.new_zeros(())
        for row in range(len(states)):  # one call a row: a mean over the batch would depend on how it was cut
            relation = relation + contextual_relation_loss(
                states[row : row + 1, :, :length],
                batch.teacher_states[row : row + 1, :, :length],
                window=self.recipe.window,
                mask=mask[row : row + 1],
                layer_weight=self.recipe.layer_weight,
                impl="reference",
            )
        return {**super().terms(logits, None, batch), "relation": relation / batch.parts}
