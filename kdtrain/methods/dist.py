"""DIST: correlation in place of divergence (Huang et al., NeurIPS 2022), across classes and across the batch."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Method, Needs, Step
from kdtrain.methods.kd import Temperature, Weight
from kdtrain.outputs import Batch, LogitOutputs, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import MethodOptions

TINY = 1e-8
"""Keeps the correlation of a constant vector finite (it is 0)."""


class CorrelationDistillation(Method):
    """`T^2 (inter_weight * mean_b (1 - rho_b) + intra_weight * mean_c (1 - rho_c)) + ce_weight * CE`.

    rho is Pearson's correlation between the probabilities of student and teacher at temperature T: rho_b over the
    classes of one row, rho_c over the rows of one class. The second needs every row of the batch at once: the
    micro-batches share their logits, and the gradient is that of the undivided batch. With two classes rho_b is +1
    or -1 and has no gradient.
    """

    # Only a classifier has logits.
    tasks = frozenset({"classification"})

    class Options(MethodOptions):
        """Correlations of probabilities across classes and across the rows of a batch."""

        name: Literal["dist"] = "dist"
        temperature: Temperature = Field(
            default=4.0,
            description="T that softens both sides; value and gradient are multiplied by T squared",
        )
        inter_weight: Weight = Field(
            default=1.0, description="weight of the correlation across classes, row by row"
        )
        intra_weight: Weight = Field(
            default=1.0, description="weight of the correlation across the whole batch, class by class"
        )
        ce_weight: Weight = Field(default=1.0, description="weight of the cross entropy with the labels")

    def needs(self) -> Needs:
        """The logits of the whole batch."""
        return Needs(whole_batch=True)

    def weights(self, step: Step) -> dict[str, float]:
        """inter, intra and ce."""
        options = self.options
        return {"inter": options.inter_weight, "intra": options.intra_weight, "ce": options.ce_weight}

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """The logits of both sides."""
        assert isinstance(student, LogitOutputs)
        return {"student": student.logits, "teacher": teachers["teacher"].logits}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """inter and intra (with T squared) and ce."""
        assert isinstance(student, LogitOutputs)
        temperature = self.options.temperature
        ours = (student.logits / temperature).softmax(dim=1)
        theirs = (teachers["teacher"].logits / temperature).softmax(dim=1)
        inter = (1 - correlation(ours, theirs)).sum()
        others = batch.whole["student"]
        all_ours = (others.values / temperature).softmax(dim=1).index_copy(0, others.places, ours)
        all_theirs = (batch.whole["teacher"].values / temperature).softmax(dim=1)
        intra = len(all_ours) * (1 - correlation(all_ours.T, all_theirs.T)).mean()
        # Each micro-batch computes the whole term; its value is counted once, in proportion, its gradient in full.
        intra = intra - intra.detach() * (1 - len(ours) / len(all_ours))
        return {
            "inter": temperature**2 * inter,
            "intra": temperature**2 * intra,
            "ce": student.cross_entropy(),
        }


def correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson's correlation of each row of (R, K) with the same row of the other, (R,)."""
    left, right = (side - side.mean(dim=1, keepdim=True) for side in (left, right))
    return (left * right).sum(dim=1) / (left.norm(dim=1) * right.norm(dim=1) + TINY)
