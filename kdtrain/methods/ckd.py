"""Contextual distillation (Park et al., EMNLP 2021) in the form of arXiv 2508.15423: relations instead of states."""

from typing import ClassVar

import torch
from torch import Tensor

from kdkernels import contextual_relation_loss
from kdtrain.errors import KdtrainError
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.layers import layer_pairs
from kdtrain.models.loading import Shape
from kdtrain.recipe import MethodRecipe
from kdtrain.tasks.classification.objective import Batch


class ContextualDistillation(LogitDistillation):
    """The terms of kd, and `feature_weight * (WR + layer_weight * LTR)` over whole sequences.

    WR compares distances and angles between neighbouring tokens of a layer, LTR those between the matched layers of a
    token; widths may differ, nothing is projected. Each row counts the same. A Transformer student also matches
    the embeddings; a BiGRU has none of its width. Tokens are compared place by place, up to the end of
    the shorter of the two rows of tokens; padding is neither read nor counted.
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
        ours = batch.attention_mask.reshape(len(states), -1)[:, :length].sum(dim=1)
        lengths = torch.minimum(ours, batch.teacher_mask[:, :length].sum(dim=1))
        relation = contextual_relation_loss(
            states[:, :, :length],
            batch.teacher_states[:, :, :length],
            window=self.recipe.window,
            mask=torch.arange(length, device=lengths.device) < lengths.unsqueeze(1),
            layer_weight=self.recipe.layer_weight,
            # Over all relations of the batch, the mean would depend on how the batch was cut.
            average="samples",
        )
        return {**super().terms(logits, None, batch), "relation": relation * (len(states) / batch.parts)}
