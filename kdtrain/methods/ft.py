"""Fine-tuning: the labels alone. The baseline of every distilled student."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Method, Step
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import FINITE, NOT_NEGATIVE, MethodOptions, Number


class FineTuning(Method):
    """`ce_weight * CE`; needs no teacher."""

    class Options(MethodOptions):
        """Cross entropy with the labels, and nothing else."""

        name: Literal["ft"] = "ft"
        ce_weight: Annotated[Number, NOT_NEGATIVE, FINITE] = Field(
            default=1.0, description="weight of the cross entropy with the labels"
        )

    @classmethod
    def teachers_of(cls, options: Any) -> tuple[str, ...]:
        """None."""
        return ()

    def weights(self, step: Step) -> dict[str, float]:
        """ce."""
        return {"ce": self.options.ce_weight}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """ce."""
        return {"ce": student.cross_entropy()}
