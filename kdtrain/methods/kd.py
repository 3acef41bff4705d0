"""Logit distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531), with any divergence."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Method, Step
from kdtrain.methods.divergences import DivergenceChoice, divergence_of
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import FINITE, NOT_NEGATIVE, POSITIVE, MethodOptions, Number

Weight = Annotated[Number, NOT_NEGATIVE, FINITE]
Temperature = Annotated[Number, POSITIVE, FINITE]


class KDOptions(MethodOptions):
    """`kd_weight * T^2 * divergence + ce_weight * CE` at every position."""

    divergence: DivergenceChoice = Field(
        default="forward_kl",
        description="between the distributions of teacher and student: a name, or {name, parameters}",
    )
    temperature: Temperature = Field(
        default=2.0, description="T that softens both sides; value and gradient are multiplied by T squared"
    )
    kd_weight: Weight = Field(default=1.0, description="weight of the divergence")
    ce_weight: Weight = Field(default=1.0, description="weight of the cross entropy with the labels")
    last_temperature: Temperature | None = Field(
        default=None, description="temperature at the last step; changes linearly from `temperature`"
    )
    last_kd_weight: Weight | None = Field(
        default=None, description="kd_weight at the last step; changes linearly from `kd_weight`"
    )
    last_ce_weight: Weight | None = Field(
        default=None, description="ce_weight at the last step; changes linearly from `ce_weight`"
    )


class LogitTerms(Method):
    """The divergence from the teacher and the cross entropy with the labels, which several methods start from."""

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        self.divergence = divergence_of(options.divergence)

    def weights(self, step: Step) -> dict[str, float]:
        """kd and ce."""
        options = self.options
        return {
            "kd": between(options.kd_weight, options.last_kd_weight, step),
            "ce": between(options.ce_weight, options.last_ce_weight, step),
        }

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd (with T squared) and ce."""
        (teacher,) = teachers.values()
        temperature = between(self.options.temperature, self.options.last_temperature, step)
        return {
            "kd": student.divergence(teacher, self.divergence, temperature=temperature),
            "ce": student.cross_entropy(),
        }


class LogitDistillation(LogitTerms):
    """`kd_weight * T^2 * D(teacher, student) + ce_weight * CE`; rows without a label have only the first term."""

    class Options(KDOptions):
        """`kd_weight * T^2 * divergence + ce_weight * CE` at every position."""

        name: Literal["kd"] = "kd"


def between(first: float, last: float | None, step: Step) -> float:
    """A value that changes linearly from the first step to the last; constant without `last`."""
    return first if last is None else first + step.share * (last - first)
