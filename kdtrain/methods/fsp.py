"""FSP (Yim et al., CVPR 2017): the flow between two layers."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from kdkernels import fsp_loss
from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Step
from kdtrain.methods.kd import Weight
from kdtrain.methods.token_states import TokenStates, TokenStatesOptions
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, Features, LogitTerm, Outputs, TeacherOutputs


class SolutionFlow(TokenStates):
    """The terms of kd, and `flow_weight * mean (G_s - G_t)^2` of every text, a mean over neighbouring layer pairs.

    `G = 1/N sum_n a_n b_n^T` is the product of the channels of two layers of one side, averaged over the tokens of the text
    (equations 1 and 2 of the paper). Both sides have to be of one width; numbers of tokens may differ.
    """

    class Options(TokenStatesOptions):
        """How one layer follows from another."""

        name: Literal["fsp"] = "fsp"
        flow_weight: Weight = Field(default=50.0, description="weight of the flow between layers")

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        if student.width != teacher.width:
            raise KdtrainError(
                f"method fsp compares products of channels, and the student has {student.width} of them, the teacher "
                f"{teacher.width}; set student.hidden_size to {teacher.width}, or choose another method.name"
            )
        if len(self.pairs) < 2:
            raise KdtrainError(
                f"method fsp needs two pairs of layers or more, got {[list(pair) for pair in self.pairs]}; name them in "
                "method.layer_map"
            )

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and flow."""
        return {**super().weights(step), "flow": self.options.flow_weight}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and flow."""
        (teacher,) = teachers.values()
        assert student.token_mask is not None and teacher.token_mask is not None
        length = max(student.token_mask.shape[1], teacher.token_mask.shape[1])

        def states(side: Features, layer: int, *, mean: bool) -> Tensor:
            """Padded to one length; `mean`: such that a mean over that length is one over the tokens of the text."""
            assert side.token_mask is not None
            valid = self.valid(side, layer)
            if mean:
                valid = valid * (length / side.token_mask.sum(1))[:, None, None]
            return pad(valid, (0, 0, 0, length - valid.shape[1]))

        losses = [
            fsp_loss(
                states(student, ours, mean=True),
                states(student, ours_next, mean=False),
                states(teacher, theirs, mean=True),
                states(teacher, theirs_next, mean=False),
            )
            for (ours, theirs), (ours_next, theirs_next) in pairwise(self.pairs)
        ]
        total = torch.stack(losses).mean() * (len(student.token_mask) / student.texts)
        return {**super().terms(step, batch, student, teachers), "flow": total}
