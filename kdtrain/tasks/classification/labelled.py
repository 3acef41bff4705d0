"""A split as a run reads it: tokens, labels, and the stored teacher outputs where there are any."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdtrain.outputs import Batch
from kdtrain.tasks.classification.pairs import Rows
from kdtrain.tasks.classification.teacher_outputs import TeacherRows


@dataclass(frozen=True)
class LabelledRows:
    """Tokenized rows, their labels, and the stored teacher outputs."""

    rows: Rows
    labels: Tensor
    digest: str
    """of the texts, see `TextRows.digest`"""
    teacher: TeacherRows | None = None
    states: Literal["none", "first tokens", "sequences"] = "none"
    """which states of the teacher come with a micro-batch"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    @property
    def teacher_logits(self) -> Tensor | None:
        """(rows, C) float32, where a teacher is stored."""
        return None if self.teacher is None else self.teacher.logits

    def batch(
        self,
        rows: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows, padded to the longest of them."""
        input_ids, mask = self.rows.batch(rows)
        outputs: dict[str, Tensor] = {}
        if self.teacher is not None and stored:
            outputs["logits"] = self.teacher.logits[rows]
            if self.states == "first tokens":
                outputs["states"] = self.teacher.states(rows)
            elif self.states == "sequences":
                outputs["states"], outputs["mask"] = self.teacher.sequences(rows)
        return Batch(
            input_ids=input_ids.to(device),
            labels=self.labels[rows].to(device),
            rows=rows,
            attention_mask=mask.to(device),
            stored={"teacher": {name: value.to(device) for name, value in outputs.items()}}
            if outputs
            else {},
        )

    def count(self, rows: Tensor) -> int:
        """The number of rows."""
        return len(rows)
