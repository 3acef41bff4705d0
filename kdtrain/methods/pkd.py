"""Patient distillation (Sun et al. 2019, arXiv 1908.09355) in the form of arXiv 2508.15423, for unequal widths."""

from typing import ClassVar

from kdtrain.methods.kd_features import FeatureDistillation, Side
from kdtrain.methods.layers import Pairs, all_but_the_last, layer_pairs
from kdtrain.models.loading import Shape
from kdtrain.recipe import MethodRecipe


class PatientDistillation(FeatureDistillation):
    """The terms of kd, and `feature_weight * MSE(n(h_s), n(W h_t))` between sentence states.

    n divides by the L2 norm, W is a linear map of the teacher, one for each pair of layers and trained along; the mean
    runs over widths and pairs. By default student layer i meets teacher layer i * (teacher layers / student layers),
    and the last pair is left out: what it says, the logits say.
    """

    normalize: ClassVar[bool] = True

    def compared(self, recipe: MethodRecipe, student: Shape, teacher: Shape) -> tuple[Pairs, Side]:
        """All pairs but the last, unless they are named; the teacher is mapped."""
        pairs = layer_pairs(recipe.layer_map, student.layers, teacher.layers)
        return pairs if recipe.layer_map else all_but_the_last(pairs), "teacher"
