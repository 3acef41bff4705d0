"""Several teachers at once: each has a weight, for all rows or by a column of the data."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Method, Step
from kdtrain.methods.divergences import divergence_of
from kdtrain.methods.kd import KDOptions, Weight, between
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import Text


def _positive_sum(weights: dict[str, float]) -> dict[str, float]:
    if not sum(weights.values()) > 0:
        raise ValueError(
            f"method.teacher_weights must have a sum above 0, got {weights}; name each teacher with its weight, such as "
            "{teacher: 0.7, second: 0.3}"
        )
    return weights


class RoutedTeachers(Method):
    """`kd_weight * sum_k w_k T^2 D(p_k, p_s) + ce_weight * CE` over the teachers k.

    By default w_k is `teacher_weights[k]` divided by the sum of all. With `by_route`, every row has the one teacher that the
    column `data.route` of the data names: w_k is 1 for that teacher and 0 for the others, whatever the weights.
    """

    class Options(KDOptions):
        """Soft labels of several teachers."""

        name: Literal["routed"] = "routed"
        teacher_weights: Annotated[dict[Text, Weight], AfterValidator(_positive_sum)] = Field(
            description="weight of each teacher by its name in `teachers`"
        )
        by_route: bool = Field(
            default=False, description="whether data.route names the one teacher of every row"
        )

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        self.divergence = divergence_of(options.divergence)

    @classmethod
    def teachers_of(cls, options: Any) -> tuple[str, ...]:
        """Those with a weight."""
        return tuple(options.teacher_weights)

    def weights(self, step: Step) -> dict[str, float]:
        """kd of every teacher, and ce."""
        options = self.options
        kd = between(options.kd_weight, options.last_kd_weight, step)
        given = options.teacher_weights
        shares = {
            name: 1.0 if options.by_route else weight / sum(given.values()) for name, weight in given.items()
        }
        return {
            **{f"kd_{name}": kd * share for name, share in shares.items()},
            "ce": between(options.ce_weight, options.last_ce_weight, step),
        }

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd of every teacher, and ce."""
        temperature = between(self.options.temperature, self.options.last_temperature, step)
        terms: dict[str, Tensor | LogitTerm] = {"ce": student.cross_entropy()}
        for name, teacher in teachers.items():
            weight = None
            if self.options.by_route:
                weight = self.of_rows(batch, student, name)
            terms[f"kd_{name}"] = student.divergence(
                teacher, self.divergence, temperature=temperature, weight=weight
            )
        return terms

    def of_rows(self, batch: Batch, student: Outputs, name: str) -> Tensor:
        """1 at the positions of the rows of one teacher, 0 at others; of the shape of the labels.

        Raises:
            KdtrainError: the data names no teachers.
        """
        if batch.route is None:
            raise KdtrainError(
                "method routed has by_route: true, and the data names no teacher for its rows; set data.route to a column of "
                "names of teachers, or method.by_route: false"
            )
        chosen = torch.tensor([one == name for one in batch.route], device=student.labels.device).float()
        return chosen.view(-1, *[1] * (student.labels.ndim - 1)).expand(student.labels.shape)
