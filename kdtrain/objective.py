"""What is minimised: named, weighted terms, each a sum over rows, divided once by the rows of the whole batch.

The divisor is known before any piece of the batch runs, so cutting the batch into pieces, or sharing it between
processes, changes neither loss nor gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdtrain.data.classification import UNLABELLED
from kdtrain.models import Shape, sentence_states
from kdtrain.recipe import MethodRecipe
from kdtrain.task import Objective


@dataclass(frozen=True)
class Batch:
    """One piece of a batch, on the device."""

    input_ids: Tensor
    """(B, N) int64"""
    attention_mask: Tensor
    """(B, N) int64"""
    labels: Tensor
    """(B,) int64, `UNLABELLED` where there is none"""
    teacher_logits: Tensor | None = None
    """(B, C) float32"""
    teacher_states: Tensor | None = None
    """(B, L, D_t) float32, the layers that the method asked for"""


class Method(nn.Module):
    """One way to learn. A subclass says what it needs of the teacher and turns outputs into terms."""

    needs_teacher: ClassVar[bool] = True
    student_layers: tuple[int, ...] = ()
    """layers whose sentence states `terms` receives; 0 is the embeddings"""
    teacher_layers: tuple[int, ...] = ()
    """layers whose sentence states come with the batch"""

    def __init__(self, recipe: MethodRecipe, student: Shape, teacher: Shape | None) -> None:
        super().__init__()
        self.recipe = recipe
        self.weights: dict[str, float] = {"ce": recipe.ce_weight}

    def terms(self, logits: Tensor, states: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """One 0-D float32 sum over the rows for every name in `weights`.

        Args:
            logits: (B, C) float32, the student's.
            states: (B, L, D_s) float32 of `student_layers`, None when there are none.
            batch: the rows, with the teacher's outputs.
        """
        raise NotImplementedError


def label_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled rows of the cross-entropy at temperature 1."""
    return nn.functional.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")


class DistillationModel(Objective):
    """A classifier and its method as one module."""

    def __init__(self, student: PreTrainedModel, method: Method) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.names = tuple(method.weights)

    def forward(self, batch: Batch, divisor: int) -> tuple[Tensor, Tensor]:
        """Loss (0-D) of this piece of a batch of `divisor` rows, and the detached sum of every term, (terms,)."""
        layers = self.method.student_layers
        output = self.student(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=bool(layers)
        )
        # The losses work in float32 whatever the precision of the matrix products.
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            states = sentence_states(output, layers).float() if layers else None
            terms = self.method.terms(output.logits.float(), states, batch)
            loss = (
                torch.stack([self.method.weights[name] * terms[name] for name in self.method.weights]).sum()
                / divisor
            )
            return loss, torch.stack([terms[name].detach() for name in self.method.weights])
