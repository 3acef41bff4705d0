"""What is minimised: named, weighted terms, each a sum over rows, divided once by the rows of the whole batch.

The divisor is known before any piece of the batch runs, so cutting the batch into pieces, or sharing it between
processes, changes neither loss nor gradient.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdtrain.models.loading import Shape, sentence_states, sequence_states
from kdtrain.recipe import MethodRecipe
from kdtrain.tasks.base import Objective
from kdtrain.tasks.classification.rows import UNLABELLED


@dataclass(frozen=True)
class WholeBatch:
    """The logits of a batch of which a piece is at work, for losses that compare rows with each other."""

    student_logits: Tensor
    """(rows, C) float32, without a graph"""
    teacher_logits: Tensor
    """(rows, C) float32"""
    places: Tensor
    """(B,) int64, where the rows of this piece stand in it"""


@dataclass(frozen=True)
class Batch:
    """One piece of a batch, on the device. A row has P texts: 1, or 2 in tasks over pairs."""

    input_ids: Tensor
    """(B, N) int64, or (B, 2, N)"""
    attention_mask: Tensor
    """as input_ids"""
    labels: Tensor
    """(B,) int64, `UNLABELLED` where there is none"""
    teacher_logits: Tensor | None = None
    """(B, C) float32"""
    teacher_states: Tensor | None = None
    """(B * P, L, D_t) float32, first tokens in the layers that the method asked for; with `whole_sequences`
    (B * P, L, N_t, D_t), every token"""
    teacher_mask: Tensor | None = None
    """(B * P, N_t) bool, which of those tokens are no padding"""
    whole: WholeBatch | None = None
    """the rest of the batch where it was cut and the method wants it whole"""

    @property
    def parts(self) -> int:
        """P."""
        return self.input_ids.shape[1] if self.input_ids.ndim == 3 else 1


class Method(nn.Module):
    """One way to learn. A subclass says what it needs of the teacher and turns outputs into terms."""

    needs_teacher: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = False
    """whether `terms` must know the logits of every row of the batch"""
    whole_sequences: ClassVar[bool] = False
    """whether states are those of every token, not those of the sentence"""
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
            states: (B * P, L, D_s) float32 of `student_layers`, or (B * P, L, N, D_s) with `whole_sequences`;
                None when there are none.
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
            take = sequence_states if self.method.whole_sequences else sentence_states
            states = take(output, layers).float() if layers else None
            terms = self.method.terms(output.logits.float(), states, batch)
            loss = (
                torch.stack([self.method.weights[name] * terms[name] for name in self.method.weights]).sum()
                / divisor
            )
            return loss, torch.stack([terms[name].detach() for name in self.method.weights])

    def look_ahead(
        self,
        pieces: Iterable[Any],
        rows: Sequence[Tensor],
        whole: Tensor,
        divisor: int,
        accelerator: Accelerator,
    ) -> tuple[Iterable[Any], int]:
        """For a method that needs the whole batch, and a batch in pieces: run all pieces without a graph first.

        The random state is put back afterwards, so that the run with a graph draws the same dropout.
        """
        if not self.method.whole_batch or len(rows) * accelerator.num_processes == 1:
            return pieces, divisor
        pieces = list(pieces)
        device = accelerator.device
        first = pieces[0].teacher_logits
        logits = torch.zeros(2, len(whole), first.shape[1], device=device)  # student's and teacher's
        places = [
            torch.tensor(
                [int((whole == row).nonzero()[0]) for row in piece], dtype=torch.int64, device=device
            )
            for piece in rows
        ]
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            accelerator.autocast(),
        ):
            for piece, where in zip(pieces, places, strict=True):
                output = self.student(input_ids=piece.input_ids, attention_mask=piece.attention_mask)
                if len(where):  # a piece that only fills up is run for the sake of the random numbers
                    logits[0, where] = output.logits.float()
                    logits[1, where] = piece.teacher_logits
        student, teacher = accelerator.reduce(logits, "sum").unbind()  # type: ignore[union-attr]
        return [
            replace(piece, whole=WholeBatch(student, teacher, where if len(where) else where.new_zeros(1)))
            for piece, where in zip(pieces, places, strict=True)
        ], divisor
