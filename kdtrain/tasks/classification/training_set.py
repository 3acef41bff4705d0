"""What a classification run trains on: tokens, labels, and the stored teacher outputs where the method needs them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdtrain.tasks.classification.objective import Batch
from kdtrain.tasks.classification.pairs import Rows
from kdtrain.teacher_cache.row_cache import TeacherRows


@dataclass(frozen=True)
class TrainingSet:
    """Tokenized training rows, their labels, and the stored teacher outputs where the method needs them."""

    rows: Rows
    labels: Tensor
    teacher: TeacherRows | None = None
    states: Literal["none", "first tokens", "sequences"] = "none"
    """which of the teacher's states come with a batch"""

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def batch(self, index: Tensor, device: torch.device) -> Batch:
        """The given rows, padded to the longest of them."""
        input_ids, mask = self.rows.batch(index)
        states = teacher_mask = None
        if self.teacher is not None and self.states == "first tokens":
            states = self.teacher.states(index).to(device)
        elif self.teacher is not None and self.states == "sequences":
            states, teacher_mask = (tensor.to(device) for tensor in self.teacher.sequences(index))
        return Batch(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            labels=self.labels[index].to(device),
            teacher_logits=None if self.teacher is None else self.teacher.logits[index].to(device),
            teacher_states=states,
            teacher_mask=teacher_mask,
        )

    def count(self, index: Tensor) -> int:
        """The number of rows."""
        return len(index)
