"""Logit distillation with hidden states: patient distillation (Sun et al. 2019, arXiv 1908.09355) for unequal widths."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from kdkernels import projection_mse
from kdtrain.methods.base import Needs, Pairs, Step
from kdtrain.methods.kd import KDOptions, LogitTerms, Weight
from kdtrain.methods.layers import layer_pairs
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs

Side = Literal["student", "teacher"]


class FeatureOptions(KDOptions):
    """The terms of kd, and the states of mapped layers."""

    feature_weight: Weight = Field(default=1.0, description="weight of the loss of the hidden states")
    layer_map: Pairs = Field(
        default=(),
        description="pairs [student layer, teacher layer]; by default every student layer, spread evenly over those of "
        "the teacher",
    )


class ProjectedStates(LogitTerms):
    """The terms of kd, and `feature_weight * MSE` between mapped states, a mean over widths and layer pairs.

    One linear map per pair is trained along; it is saved beside the student and never inside.
    """

    normalize = False
    """whether both sides are divided by their L2 norm, the mapped one after its map"""

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        self.pairs = self.compared(student, teacher)
        self.project: Side = self.projected()
        widths = (student.width, teacher.width)
        source, self.width = widths if self.project == "student" else widths[::-1]
        self.projections = nn.ModuleList(nn.Linear(source, self.width) for _ in self.pairs)

    def compared(self, student: Shape, teacher: Shape) -> Pairs:
        """The pairs of layers."""
        return layer_pairs(self.options.layer_map, student.layers, teacher.layers)

    def projected(self) -> Side:
        """The side that is mapped onto the width of the other."""
        return "student"

    def needs(self) -> Needs:
        """States of the paired layers."""
        return Needs(layers=self.pairs)

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and feature."""
        return {**super().weights(step), "feature": self.options.feature_weight}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and feature."""
        (teacher,) = teachers.values()
        losses = []
        for (ours, theirs), projection in zip(self.pairs, self.projections, strict=True):
            assert isinstance(projection, nn.Linear)
            losses.append(
                projection_mse(
                    student.states[ours],
                    teacher.states[theirs],
                    projection.weight,
                    projection.bias,
                    project=self.project,
                    normalize=self.normalize,
                    mask=student.counted,
                    reduction="sum",
                )
            )
        feature = sum(losses[1:], losses[0]) / (self.width * len(self.pairs) * student.texts)
        return {**super().terms(step, batch, student, teachers), "feature": feature}


class FeatureDistillation(ProjectedStates):
    """The terms of kd, and `feature_weight * MSE` between mapped states; either side may be the mapped one."""

    class Options(FeatureOptions):
        """The terms of kd, and the squared error between mapped states."""

        name: Literal["kd_features"] = "kd_features"
        project: Side = Field(
            default="student", description="the side that is mapped onto the width of the other"
        )

    def projected(self) -> Side:
        """As the recipe says."""
        return self.options.project
