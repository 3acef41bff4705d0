"""Similarity-preserving distillation (Tung and Mori 2019, arXiv 1907.09682): which samples a layer finds similar."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from kdkernels import similarity_preserving_loss
from kdtrain.methods.batch_states import BatchStates, BatchStatesOptions
from kdtrain.methods.kd import Weight


class SimilarityPreserving(BatchStates):
    """`mean_ij (G_s - G_t)^2`, where G = F F^T with rows of length 1. Equations 2 to 4 of the paper, whose weight is 3000."""

    class Options(BatchStatesOptions):
        """Similarities between the rows of a batch."""

        name: Literal["sp"] = "sp"
        relation_weight: Weight = Field(default=3000.0, description="weight of the relations between rows")

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Squared difference of the similarity matrices."""
        return similarity_preserving_loss(student, teacher)
