"""Probabilistic knowledge transfer and its layer-wise form (Passalis et al. 2018; 2020, arXiv 2005.00727)."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kdkernels import pkt_loss
from kdtrain.methods.base import Step
from kdtrain.methods.batch_states import BatchStates, BatchStatesOptions, whole_batch_sum
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import NOT_NEGATIVE, Number

Decay = Annotated[Number, Field(gt=0, le=1)]


class ProbabilisticTransfer(BatchStates):
    """Divergence between both sides' probabilities of picking one row as the neighbour of another, layer by layer.

    `relation_weight * (J(last) + w * sum J(earlier))` with `w = early_weight * early_decay^epoch`: earlier layers matter in
    the first epochs only, the critical period of arXiv 2005.00727 (sections 3.2 and 3.3; 100 and 0.7 in its code). The pair
    that stands last in `layer_map` is the last layer. J is the Jeffreys divergence; `combined` adds both kernels.
    An auxiliary teacher, as in the paper, is a first run whose `student/` is the teacher of a second.
    """

    class Options(BatchStatesOptions):
        """Probabilities of being neighbours in a batch."""

        name: Literal["pkt"] = "pkt"
        kernel: Literal["cosine", "student_t", "combined"] = Field(
            default="combined",
            description="similarity of two rows: (1 + cosine) / 2, 1 / (1 + distance), or both",
        )
        divergence_of_neighbours: Literal["kl", "jeffreys"] = Field(
            default="jeffreys", description="divergence between the probabilities of both sides"
        )
        early_weight: Annotated[Number, NOT_NEGATIVE] = Field(
            default=100.0, description="weight of the earlier layers in the first epoch"
        )
        early_decay: Decay = Field(default=0.7, description="factor of that weight from epoch to epoch")

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence for one pair of layers."""
        kernels = ("cosine", "student_t") if self.options.kernel == "combined" else (self.options.kernel,)
        parts = [
            pkt_loss(student, teacher, kernel=kernel, divergence=self.options.divergence_of_neighbours)
            for kernel in kernels
        ]
        return sum(parts[1:], parts[0])

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and relation."""
        early = self.options.early_weight * self.options.early_decay ** int(step.epoch)
        total = 0.0
        for number, (ours, theirs) in enumerate(self.pairs, start=1):
            shared = batch.whole[f"student {ours}"]
            relation = self.relation(
                shared.with_own(student.states[ours]), batch.whole[f"teacher {theirs}"].values
            )
            weight = 1.0 if number == len(self.pairs) else early
            total = total + weight * whole_batch_sum(relation, shared) / student.texts
        assert isinstance(total, Tensor)
        return {**super().terms(step, batch, student, teachers), "relation": total}
