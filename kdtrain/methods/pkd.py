"""Patient distillation (Sun et al. 2019, arXiv 1908.09355) in the form of arXiv 2508.15423, for unequal widths."""

from torch import Tensor, nn

from kdkernels import projection_mse
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.layers import all_but_the_last, layer_pairs
from kdtrain.models import Shape
from kdtrain.objective import Batch
from kdtrain.recipe import MethodRecipe


class PatientDistillation(LogitDistillation):
    """The terms of kd, and `feature_weight * MSE(n(h_s), n(W h_t))` between sentence states.

    n divides by the L2 norm, W is a linear map of the teacher, one for each pair of layers and trained along; the mean
    runs over widths and pairs. By default student layer i meets teacher layer i * (teacher layers / student layers),
    and the last pair is left out: what it says, the logits say.
    """

    def __init__(self, recipe: MethodRecipe, student: Shape, teacher: Shape | None) -> None:
        super().__init__(recipe, student, teacher)
        assert teacher is not None
        pairs = layer_pairs(recipe.layer_map, student.layers, teacher.layers)
        if not recipe.layer_map:
            pairs = all_but_the_last(pairs)
        self.student_layers = tuple(pair[0] for pair in pairs)
        self.teacher_layers = tuple(pair[1] for pair in pairs)
        self.weights["feature"] = recipe.feature_weight
        self.width = student.width
        self.projections = nn.ModuleList(nn.Linear(teacher.width, student.width) for _ in pairs)

    def terms(self, logits: Tensor, states: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """kd, ce and feature."""
        assert states is not None and batch.teacher_states is not None
        total = logits.new_zeros(())
        for i, projection in enumerate(self.projections):
            assert isinstance(projection, nn.Linear)
            total = total + projection_mse(
                states[:, i],
                batch.teacher_states[:, i],
                projection.weight,
                projection.bias,
                project="teacher",
                normalize=True,
                reduction="sum",
            )
        feature = total / (self.width * len(self.projections) * batch.parts)
        return {**super().terms(logits, None, batch), "feature": feature}
