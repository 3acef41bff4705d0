"""Logit distillation with hidden states: patient distillation (Sun et al. 2019, arXiv 1908.09355) for unequal widths."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from kdkernels import projection_mse
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.layers import Pairs, layer_pairs
from kdtrain.models.loading import Shape
from kdtrain.recipe import MethodRecipe
from kdtrain.tasks.classification.objective import Batch

Side = Literal["student", "teacher"]


class FeatureDistillation(LogitDistillation):
    """The terms of kd, and `feature_weight * MSE` between mapped sentence states, mean over widths and layer pairs.

    One linear map per pair is trained along; it stays in the run's `projection.safetensors` and never ships
    inside the student.
    """

    normalize: ClassVar[bool] = False
    """whether both sides are divided by their L2 norm, the mapped one after its map"""

    def __init__(self, recipe: MethodRecipe, student: Shape, teacher: Shape | None) -> None:
        super().__init__(recipe, student, teacher)
        assert teacher is not None
        pairs, project = self.compared(recipe, student, teacher)
        self.project: Side = project
        self.student_layers = tuple(pair[0] for pair in pairs)
        self.teacher_layers = tuple(pair[1] for pair in pairs)
        self.weights["feature"] = recipe.feature_weight
        widths = (student.width, teacher.width)
        source, self.target_width = widths if project == "student" else widths[::-1]
        self.projections = nn.ModuleList(nn.Linear(source, self.target_width) for _ in pairs)

    def compared(self, recipe: MethodRecipe, student: Shape, teacher: Shape) -> tuple[Pairs, Side]:
        """The pairs of layers, and the side that is mapped onto the other's width."""
        return layer_pairs(recipe.layer_map, student.layers, teacher.layers), recipe.project

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
                project=self.project,
                normalize=self.normalize,
                reduction="sum",
            )
        feature = total / (self.target_width * len(self.projections) * batch.parts)
        return {**super().terms(logits, None, batch), "feature": feature}
