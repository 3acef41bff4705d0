"""Dynamic KD, teacher adoption (Li et al., EMNLP 2021, arXiv 2109.11295): an uncertain student learns from the smaller teacher."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Method, Needs, Step
from kdtrain.methods.divergences import divergence_of
from kdtrain.methods.dynamic_selection import uncertainty
from kdtrain.methods.kd import KDOptions, between
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitOutputs, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import Text


class DynamicTeachers(Method):
    """`kd_weight * (w T^2 D(small) + (1 - w) T^2 D(large)) + ce_weight * CE`, row by row (section 3 of the paper).

    u = H(p_s) / log C is the uncertainty of the student, without a gradient. `hard`: w = 1 for the more uncertain half of the
    whole batch, 0 for the other. `soft`: w is the mean of u over the whole batch. `soft_instance`: w is u of the row.
    """

    # The uncertainty is that of a row.
    tasks = frozenset({"classification"})

    class Options(KDOptions):
        """Two teachers, weighed by the uncertainty of the student."""

        name: Literal["dynamic_teachers"] = "dynamic_teachers"
        large: Text = Field(default="teacher", description="the teacher of a certain student")
        small: Text = Field(default="small", description="the teacher of an uncertain student")
        adoption: Literal["hard", "soft", "soft_instance"] = Field(
            default="soft_instance", description="how uncertainty chooses between the two"
        )

        @model_validator(mode="after")
        def _two_teachers(self) -> Self:
            if self.large == self.small:
                raise KdtrainError(
                    f"method.large and method.small are both {self.large}; name two different teachers"
                )
            return self

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        self.divergence = divergence_of(options.divergence)

    @classmethod
    def teachers_of(cls, options: Any) -> tuple[str, ...]:
        """Large and small."""
        return (options.large, options.small)

    def needs(self) -> Needs:
        """The uncertainty of the whole batch, unless every row has its own weight."""
        return Needs(whole_batch=self.options.adoption != "soft_instance")

    def weights(self, step: Step) -> dict[str, float]:
        """kd of both teachers, and ce."""
        kd = between(self.options.kd_weight, self.options.last_kd_weight, step)
        ce = between(self.options.ce_weight, self.options.last_ce_weight, step)
        return {"kd_small": kd, "kd_large": kd, "ce": ce}

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """The uncertainty of every row."""
        return {"uncertainty": self.uncertain(student)}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd of both teachers, and ce."""
        own = self.uncertain(student)
        if self.options.adoption == "soft_instance":
            of_small = own
        else:
            whole = batch.whole["uncertainty"]
            if self.options.adoption == "soft":
                of_small = whole.values.mean().expand(len(own))
            else:
                half = len(whole.values) // 2
                chosen = torch.zeros_like(whole.values)
                chosen[whole.values.argsort(descending=True, stable=True)[:half]] = 1.0
                of_small = chosen[whole.places]
        temperature = between(self.options.temperature, self.options.last_temperature, step)
        weights = {"small": of_small, "large": 1 - of_small}
        terms: dict[str, Tensor | LogitTerm] = {
            f"kd_{size}": student.divergence(
                teachers[getattr(self.options, size)], self.divergence, temperature=temperature, weight=weight
            )
            for size, weight in weights.items()
        }
        return {**terms, "ce": student.cross_entropy()}

    @staticmethod
    def uncertain(student: Outputs) -> Tensor:
        """(B,) in [0, 1]."""
        assert isinstance(student, LogitOutputs)
        logits = student.logits.detach()
        return uncertainty(logits, "entropy") / math.log(logits.shape[1])
