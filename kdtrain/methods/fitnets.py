"""FitNets (Romero et al. 2015, arXiv 1412.6550): hints of the teacher's layers first, soft labels after."""

from typing import Annotated, Literal

from pydantic import Field

from kdtrain.methods.base import Step
from kdtrain.methods.kd_features import FeatureOptions, ProjectedStates
from kdtrain.recipe.base import Number


class Hints(ProjectedStates):
    """Two stages: `feature_weight * MSE(r(h_s), h_t)` alone for `hint_share` of the steps, then the terms of kd alone.

    r is a linear regressor onto the teacher's width, one for each pair of layers (equation 3 of the paper); stage two is
    equation 2. The optimizer keeps its state from one stage to the next.
    """

    class Options(FeatureOptions):
        """Hints of layers in a first stage, soft labels in a second."""

        name: Literal["fitnets"] = "fitnets"
        hint_share: Annotated[Number, Field(gt=0, lt=1)] = Field(
            default=0.3, description="share of the steps in the first stage"
        )

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and feature, of which one stage has the first two and the other the last."""
        first = step.share < self.options.hint_share
        return {
            name: weight if (name == "feature") == first else 0.0
            for name, weight in super().weights(step).items()
        }
