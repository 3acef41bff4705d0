"""Logit distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)."""

from torch import Tensor

from kdkernels import kd_loss
from kdtrain.models.loading import Shape
from kdtrain.recipe import MethodRecipe
from kdtrain.tasks.classification.objective import Batch, Method, label_cross_entropy


class LogitDistillation(Method):
    """`kd_weight * T^2 * D(teacher, student) + ce_weight * CE`; rows without a label have only the first term."""

    def __init__(self, recipe: MethodRecipe, student: Shape, teacher: Shape | None) -> None:
        super().__init__(recipe, student, teacher)
        self.weights = {"kd": recipe.kd_weight, "ce": recipe.ce_weight}

    def terms(self, logits: Tensor, states: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """kd (with its T squared) and ce."""
        assert batch.teacher_logits is not None
        divergence = kd_loss(
            logits,
            batch.teacher_logits,
            divergence=self.recipe.divergence,
            temperature=self.recipe.temperature,
            reduction="sum",
        )
        return {"kd": divergence, "ce": label_cross_entropy(logits, batch.labels)}
