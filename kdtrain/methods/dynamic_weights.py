"""Dynamic KD, supervision (Li et al., EMNLP 2021, arXiv 2109.11295): soft labels or hidden states, row by row."""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from kdkernels import projection_mse
from kdtrain.methods.base import Step
from kdtrain.methods.dynamic_selection import uncertainty
from kdtrain.methods.kd_features import FeatureOptions, ProjectedStates, Side
from kdtrain.outputs import Batch, LogitOutputs, LogitTerm, Outputs, TeacherOutputs


class DynamicWeights(ProjectedStates):
    """`ce_weight * CE + kd_weight * (1 - u) T^2 KL + feature_weight * u MSE(n(h_s), n(W h_t))`, row by row.

    u = H(p_s) / log C is the uncertainty of the student, without a gradient: a certain student learns from soft labels, an
    uncertain one from hidden states (section 5 of the paper). `swapped` exchanges the two weights, the paper's control.
    The paper compares logits by squared errors in its experiments; the KL with T is that of its plug-in.
    n divides by the L2 norm; W is a linear map of the teacher, one for each pair of layers.
    """

    normalize = True
    # The uncertainty is that of a row.
    tasks = frozenset({"classification"})

    class Options(FeatureOptions):
        """Soft labels for certain rows, hidden states for uncertain ones."""

        name: Literal["dynamic_weights"] = "dynamic_weights"
        swapped: bool = Field(
            default=False, description="exchange the weights of soft labels and hidden states"
        )

    def projected(self) -> Side:
        """The teacher."""
        return "teacher"

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and feature."""
        assert isinstance(student, LogitOutputs)
        (teacher,) = teachers.values()
        logits = student.logits.detach()
        uncertain = uncertainty(logits, "entropy") / math.log(logits.shape[1])
        of_states, of_labels = uncertain, 1 - uncertain
        if self.options.swapped:
            of_states, of_labels = of_labels, of_states
        total = logits.new_zeros(())
        for (ours, theirs), projection in zip(self.pairs, self.projections, strict=True):
            assert isinstance(projection, nn.Linear)
            rows = projection_mse(
                student.states[ours],
                teacher.states[theirs],
                projection.weight,
                projection.bias,
                project=self.project,
                normalize=True,
                reduction="none",
            )
            total = total + (rows * of_states.repeat_interleave(student.texts)).sum()
        terms = super(ProjectedStates, self).terms(step, batch, student, teachers)
        terms["kd"] = student.divergence(
            teacher, self.divergence, temperature=self.options.temperature, weight=of_labels
        )
        return {**terms, "feature": total / (self.width * len(self.pairs) * student.texts)}
