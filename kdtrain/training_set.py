"""What a classification run trains on: tokens, labels, and the stored teacher outputs where the method needs them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain.cache import TeacherRows
from kdtrain.data.tokens import TokenRows
from kdtrain.objective import Batch


@dataclass(frozen=True)
class TrainingSet:
    """Tokenized training rows, their labels, and the stored teacher outputs where the method needs them."""

    rows: TokenRows
    labels: Tensor
    teacher: TeacherRows | None = None
    with_states: bool = False

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def batch(self, index: Tensor, device: torch.device) -> Batch:
        """The given rows, padded to the longest of them."""
        input_ids, mask = self.rows.batch(index)
        return Batch(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            labels=self.labels[index].to(device),
            teacher_logits=None if self.teacher is None else self.teacher.logits[index].to(device),
            teacher_states=self.teacher.states(index).to(device)
            if self.teacher and self.with_states
            else None,
        )

    def count(self, index: Tensor) -> int:
        """The number of rows."""
        return len(index)
