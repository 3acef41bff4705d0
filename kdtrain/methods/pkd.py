"""Patient distillation (Sun et al. 2019, arXiv 1908.09355) in the form of arXiv 2508.15423, for unequal widths."""

from typing import Literal

from pydantic import Field

from kdtrain.methods.base import Pairs
from kdtrain.methods.kd import Temperature, Weight
from kdtrain.methods.kd_features import FeatureOptions, ProjectedStates, Side
from kdtrain.methods.layers import all_but_the_last, layer_pairs
from kdtrain.models.loading import Shape


class PatientDistillation(ProjectedStates):
    """The terms of kd, and `feature_weight * MSE(n(h_s), n(W h_t))` between states.

    n divides by the L2 norm, W is a linear map of the teacher, one for each pair of layers and trained along; the mean
    runs over widths and pairs. By default student layer i meets teacher layer i * (teacher layers / student layers),
    and the last pair is left out: the logits already carry it.
    """

    class Options(FeatureOptions):
        """The terms of kd, and the squared error between normalised states, those of the teacher mapped."""

        name: Literal["pkd"] = "pkd"
        temperature: Temperature = Field(
            default=4.0,
            description="T that softens both sides; value and gradient are multiplied by T squared",
        )
        kd_weight: Weight = Field(default=0.5, description="weight of the divergence")
        ce_weight: Weight = Field(default=0.5, description="weight of the cross entropy with the labels")
        feature_weight: Weight = Field(default=100.0, description="weight of the loss of the hidden states")

    normalize = True

    def compared(self, student: Shape, teacher: Shape) -> Pairs:
        """All pairs but the last, unless the recipe names them."""
        pairs = layer_pairs(self.options.layer_map, student.layers, teacher.layers)
        return pairs if self.options.layer_map else all_but_the_last(pairs)

    def projected(self) -> Side:
        """The teacher."""
        return "teacher"
