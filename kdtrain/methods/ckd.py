"""Contextual distillation (Park et al., EMNLP 2021) in the form of arXiv 2508.15423: relations instead of states."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdkernels import contextual_relation_loss
from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Needs, Pairs, Step
from kdtrain.methods.kd import KDOptions, LogitTerms, Temperature, Weight
from kdtrain.methods.layers import layer_pairs
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import POSITIVE, Whole


class ContextualDistillation(LogitTerms):
    """The terms of kd, and `feature_weight * (WR + layer_weight * LTR)` over whole sequences.

    WR compares distances and angles between neighbouring tokens of a layer, LTR those between the matched layers of a
    token; widths may differ, nothing is projected. Each row counts the same. A Transformer student also matches
    the embeddings; a BiGRU has none of the same width. Tokens are compared by position, up to the end of
    the shorter of the two token sequences; padding is neither read nor counted.
    """

    # On packed rows every document would need a weight of its own, which the loss does not take.
    tasks = frozenset({"classification"})

    class Options(KDOptions):
        """The terms of kd, and relations between the tokens of whole sequences."""

        name: Literal["ckd"] = "ckd"
        temperature: Temperature = Field(
            default=4.0,
            description="T that softens both sides; value and gradient are multiplied by T squared",
        )
        kd_weight: Weight = Field(default=0.5, description="weight of the divergence")
        ce_weight: Weight = Field(default=0.5, description="weight of the cross entropy with the labels")
        feature_weight: Weight = Field(default=1.0, description="weight of the loss of the relations")
        layer_weight: Weight = Field(
            default=1.0,
            description="weight of the relations between layers, relative to those between tokens",
        )
        window: Annotated[Whole, POSITIVE] = Field(
            default=10, description="neighbours on each side that a token is compared with"
        )
        layer_map: Pairs = Field(
            default=(),
            description="pairs [student layer, teacher layer]; by default every student layer, spread evenly over those "
            "of the teacher, and the embeddings",
        )

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        if not teacher.embeddings:
            raise KdtrainError(
                "method ckd compares the teacher token by token and needs a Transformer teacher"
            )
        pairs = layer_pairs(options.layer_map, student.layers, teacher.layers)
        self.pairs = pairs if options.layer_map or not student.embeddings else ((0, 0), *pairs)

    def needs(self) -> Needs:
        """States of every token."""
        return Needs(tokens=self.pairs)

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and relation."""
        return {**super().weights(step), "relation": self.options.feature_weight}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and relation."""
        (teacher,) = teachers.values()
        assert student.token_mask is not None and teacher.token_mask is not None
        length = min(student.token_mask.shape[1], teacher.token_mask.shape[1])
        lengths = torch.minimum(
            *(
                side.token_mask[:, :length].sum(dim=1)
                for side in (student, teacher)
                if side.token_mask is not None
            )
        )
        ours = torch.stack([student.tokens[pair[0]][:, :length] for pair in self.pairs], dim=1)
        theirs = torch.stack([teacher.tokens[pair[1]][:, :length] for pair in self.pairs], dim=1)
        relation = contextual_relation_loss(
            ours,
            theirs,
            window=self.options.window,
            mask=torch.arange(length, device=lengths.device) < lengths.unsqueeze(1),
            layer_weight=self.options.layer_weight,
            # Over all relations of the batch, the mean would depend on how the batch is split.
            average="samples",
        )
        return {
            **super().terms(step, batch, student, teachers),
            "relation": relation * (len(ours) / student.texts),
        }
