"""Losses that compare the states of all rows of a batch with each other; methods rkd, sp and pkt start from it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Needs, Pairs, Step
from kdtrain.methods.kd import KDOptions, LogitTerms, Weight
from kdtrain.methods.layers import check_layer_map
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, Shared, TeacherOutputs


class BatchStatesOptions(KDOptions):
    """The terms of kd, and relations between the rows of a batch."""

    kd_weight: Weight = Field(default=0.0, description="weight of the divergence")
    relation_weight: Weight = Field(default=1.0, description="weight of the relations between rows")
    layer_map: Pairs = Field(
        default=(), description="pairs [student layer, teacher layer]; by default the last of both"
    )


class BatchStates(LogitTerms):
    """The terms of kd, and `relation_weight` times the mean over layer pairs of a relation between all rows of a batch.

    Every row is compared with every row of the whole batch: micro-batches share their states, so that neither value nor
    gradient depends on how the batch is split. Widths may differ, since only relations are compared.
    """

    # A batch of a language model has thousands of positions, and a relation the square of that.
    tasks = frozenset({"classification"})

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        self.pairs: Pairs = options.layer_map or ((student.layers, teacher.layers),)
        check_layer_map(self.pairs, student.layers, teacher.layers)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """0-D: a mean over the rows of (R, D_s) and (R, D_t)."""
        raise NotImplementedError

    def needs(self) -> Needs:
        """States of the paired layers, of the whole batch."""
        return Needs(layers=self.pairs, whole_batch=True)

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and relation."""
        return {**super().weights(step), "relation": self.options.relation_weight}

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """The states of both sides."""
        (teacher,) = teachers.values()
        ours = {f"student {layer}": student.states[layer] for layer, _ in self.pairs}
        return ours | {f"teacher {layer}": teacher.states[layer] for _, layer in self.pairs}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and relation."""
        relations = []
        for ours, theirs in self.pairs:
            shared = batch.whole[f"student {ours}"]
            relation = self.relation(
                shared.with_own(student.states[ours]), batch.whole[f"teacher {theirs}"].values
            )
            relations.append(whole_batch_sum(relation, shared) / student.texts)
        total = sum(relations[1:], relations[0]) / len(relations)
        return {**super().terms(step, batch, student, teachers), "relation": total}


def whole_batch_sum(mean: Tensor, shared: Shared) -> Tensor:
    """A mean over the rows of the whole batch as the sum over them, for one of its micro-batches.

    Each micro-batch computes the whole mean, with a graph for its own rows only. So the gradients of all micro-batches add
    up to the whole gradient, while the value is counted once, in proportion to the rows.
    """
    total = mean * len(shared.values)
    return total - total.detach() * (1 - len(shared.places) / len(shared.values))
