"""Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068): distances and angles between samples."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from kdkernels import rkd_angle_loss, rkd_distance_loss
from kdtrain.methods.batch_states import BatchStates, BatchStatesOptions
from kdtrain.methods.kd import Weight


class RelationalDistillation(BatchStates):
    """`distance_weight * Huber(d_ij / mean d) + angle_weight * Huber(cos angle_ijk)` between the states of a batch.

    d_ij is the Euclidean distance of two rows, in units of the mean distance of that side; angle_ijk is the angle at row j.
    Equations 4 to 8 of the paper; weights 25 and 50 as in its experiments with both.
    """

    class Options(BatchStatesOptions):
        """Distances and angles between the rows of a batch."""

        name: Literal["rkd"] = "rkd"
        distance_weight: Weight = Field(default=25.0, description="weight of the distances")
        angle_weight: Weight = Field(default=50.0, description="weight of the angles")

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distances and angles, weighted."""
        distance = self.options.distance_weight * rkd_distance_loss(student, teacher)
        return distance + self.options.angle_weight * rkd_angle_loss(student, teacher)
