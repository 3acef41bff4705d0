"""DIST: correlation in place of divergence (Huang et al., NeurIPS 2022), across classes and across the batch."""

from typing import ClassVar

from torch import Tensor

from kdtrain.models.loading import Shape
from kdtrain.recipe import MethodRecipe
from kdtrain.tasks.classification.objective import Batch, Method, label_cross_entropy

TINY = 1e-8
"""Keeps the correlation of a constant vector finite (it is 0)."""


class CorrelationDistillation(Method):
    """`T^2 (inter_weight * mean_b (1 - rho_b) + intra_weight * mean_c (1 - rho_c)) + ce_weight * CE`.

    rho is Pearson's correlation between the probabilities of student and teacher at temperature T: rho_b over the
    classes of one row, rho_c over the rows of one class. The second needs every row of the batch at once: where the
    batch is cut into pieces or shared between processes, `look_ahead` brings the others' logits, and the gradient
    is that of the uncut batch. With two classes rho_b is +1 or -1 and has no gradient.
    """

    whole_batch: ClassVar[bool] = True

    def __init__(self, recipe: MethodRecipe, student: Shape, teacher: Shape | None) -> None:
        super().__init__(recipe, student, teacher)
        self.weights = {"inter": recipe.inter_weight, "intra": recipe.intra_weight, "ce": recipe.ce_weight}

    def terms(self, logits: Tensor, states: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """inter and intra (with their T squared) and ce."""
        assert batch.teacher_logits is not None
        temperature = self.recipe.temperature
        student = (logits / temperature).softmax(dim=1)
        teacher = (batch.teacher_logits / temperature).softmax(dim=1)
        inter = (1 - correlation(student, teacher)).sum()
        if batch.whole is not None:
            others = (batch.whole.student_logits / temperature).softmax(dim=1)
            student = others.index_copy(0, batch.whole.places, student)
            teacher = (batch.whole.teacher_logits / temperature).softmax(dim=1)
        intra = len(student) * (1 - correlation(student.T, teacher.T)).mean()
        # Each piece computes the whole term; its value is counted once, in proportion, its gradient in full.
        intra = intra - intra.detach() * (1 - len(logits) / len(student))
        return {
            "inter": temperature**2 * inter,
            "intra": temperature**2 * intra,
            "ce": label_cross_entropy(logits, batch.labels),
        }


def correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson's correlation of each row of (R, K) with the same row of the other, (R,)."""
    left, right = (side - side.mean(dim=1, keepdim=True) for side in (left, right))
    return (left * right).sum(dim=1) / (left.norm(dim=1) * right.norm(dim=1) + TINY)
