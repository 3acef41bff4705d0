"""Continuation KD (Jafari et al. 2022, arXiv 2212.05998) and Annealing KD (Jafari et al. 2021, arXiv 2104.07163)."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Method, Step
from kdtrain.outputs import Batch, LogitOutputs, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import FINITE, NOT_NEGATIVE, POSITIVE, MethodOptions, Number, Whole

Share = Annotated[Number, Field(ge=0, le=1)]


class ScaledLogits(Method):
    """`psi * CE + (1 - psi) * max(0, ||z_s - phi z_t||^2 - m phi)` for every row, where phi and psi depend on the step.

    phi rises from 1 / stages to 1 in equal stages: the teacher starts smoothed and ends as it is.
    """

    # Only a classifier has logits.
    tasks = frozenset({"classification"})

    def phi(self, step: Step) -> float:
        """What the teacher's logits are multiplied by: `1 - (T_i - 1) / T_max` with T_i from T_max = stages down to 1."""
        stages = self.options.stages
        return min(stages, math.floor(self.matched(step) * stages) + 1) / stages

    def matched(self, step: Step) -> float:
        """How much of the time that the teacher is matched has passed, in [0, 1]."""
        return step.share

    def psi(self, step: Step) -> float:
        """The weight of the labels."""
        raise NotImplementedError

    def weights(self, step: Step) -> dict[str, float]:
        """ce and logits."""
        psi = self.psi(step)
        return {"ce": psi, "logits": 1.0 - psi}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """ce and logits."""
        assert isinstance(student, LogitOutputs)
        (teacher,) = teachers.values()
        phi = self.phi(step)
        squared = (student.logits - phi * teacher.logits).square().sum(dim=1)
        return {
            "ce": student.cross_entropy(),
            "logits": (squared - self.options.margin * phi).clamp_min(0.0).sum(),
        }


class _Options(MethodOptions):
    stages: Annotated[Whole, POSITIVE] = Field(
        default=10,
        description="steps in which the scale of the teacher's logits rises to 1 (T_max of the paper)",
    )


class ContinuationDistillation(ScaledLogits):
    """Continuation KD, algorithm 1 of the paper: psi = label_slope * share of the steps, and 1 after `labels_from`.

    The paper's schedule for 30 epochs of GLUE (psi = i / 40 for 20 epochs, then 1) is the default. It gives no number for
    the margin m; 0, the default, leaves the squared error.
    """

    class Options(_Options):
        """A hinge on squared errors of logits, and a schedule from the teacher to the labels."""

        name: Literal["continuation"] = "continuation"
        margin: Annotated[Number, NOT_NEGATIVE, FINITE] = Field(
            default=0.0, description="squared error of a row that is ignored, times the scale of the teacher"
        )
        label_slope: Share = Field(
            default=0.75, description="weight of the labels per share of the steps, before `labels_from`"
        )
        labels_from: Share = Field(
            default=2 / 3, description="share of the steps after which the labels alone count"
        )

    def psi(self, step: Step) -> float:
        """Linear, then 1."""
        options = self.options
        return 1.0 if step.share > options.labels_from else options.label_slope * step.share


class AnnealingDistillation(ScaledLogits):
    """Annealing KD: the squared error of logits with a rising scale first, then the labels alone (equations 5 to 7)."""

    class Options(_Options):
        """Squared errors of logits with a rising scale, then labels."""

        name: Literal["annealing"] = "annealing"
        labels_from: Annotated[Number, Field(gt=0, le=1)] = Field(
            default=0.7, description="share of the steps after which the labels alone count"
        )

        @property
        def margin(self) -> float:
            """No error is ignored."""
            return 0.0

    def matched(self, step: Step) -> float:
        """The first phase, from 0 to 1."""
        return min(1.0, step.share / self.options.labels_from)

    def psi(self, step: Step) -> float:
        """0, then 1."""
        return float(step.share > self.options.labels_from)
