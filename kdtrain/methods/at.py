"""Attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928), on the tokens of a text."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from kdkernels import attention_transfer_loss
from kdtrain.methods.base import Step
from kdtrain.methods.kd import Weight
from kdtrain.methods.token_states import TokenStates, TokenStatesOptions
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs


class AttentionTransfer(TokenStates):
    """The terms of kd, and `map_weight * |Q_s - Q_t|^2` of every text, a mean over layer pairs.

    Q is the activity of the tokens, `mean_d h_d^2` at every position, divided by its L2 norm over the text (equation 2 of the
    paper with p = 2). The sum over positions, not the mean, so that padding changes nothing. Widths may differ. Texts of
    unequal numbers of tokens are compared position by position, and the shorter has no activity after its end.
    """

    class Options(TokenStatesOptions):
        """Where in a text the layers are active."""

        name: Literal["at"] = "at"
        map_weight: Weight = Field(default=10.0, description="weight of the maps of activity")

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and map."""
        return {**super().weights(step), "map": self.options.map_weight}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and map."""
        (teacher,) = teachers.values()
        losses = []
        for ours, theirs in self.pairs:
            sides = (self.valid(student, ours), self.valid(teacher, theirs))
            length = max(side.shape[1] for side in sides)
            left, right = (pad(side, (0, 0, 0, length - side.shape[1])) for side in sides)
            losses.append(attention_transfer_loss(left, right) * left[..., 0].numel())
        total = torch.stack(losses).sum() / (len(self.pairs) * student.texts)
        return {**super().terms(step, batch, student, teachers), "map": total}
