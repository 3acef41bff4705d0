"""How a masked language model becomes outputs: its predictions at the masked tokens, and nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.models.heads import Head
from kdtrain.models.masked_heads import masked_head, states_at_masked
from kdtrain.outputs import IGNORED, Batch, HeadOutputs, Layers, LogitOutputs, Outputs, TeacherOutputs
from kdtrain.tasks.masked_lm.rows import MaskedBatch

MEASURED_ROWS = 1024
"""rows of logits held at a time while measuring"""


class MaskedModels:
    """The models of a masked_lm run: a student alone, without dropout.

    Large corpora are seen few times; the model's own rates are for the fine-tuning after it.
    """

    teachers: Mapping[str, Any] = {}
    dropout = False

    def student_outputs(self, student: Any, batch: Batch, layers: Layers) -> Outputs:
        """The student at the masked tokens of one micro-batch."""
        assert batch.attention_mask is not None
        masked = batch.labels != IGNORED
        weight = None if batch.token_weight is None else batch.token_weight[masked]
        common = {"labels": batch.labels[masked], "token_weight": weight}
        head = masked_head(student)
        if head is None:  # a family of its own: all tokens go through its head
            whole = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return LogitOutputs(logits=whole.logits[masked].float(), **common)
        states = states_at_masked(student, batch.input_ids, batch.attention_mask, masked)
        decoder = head.decoder
        return HeadOutputs(hidden=head.transform(states), head=Head(decoder.weight, decoder.bias), **common)

    def teacher_outputs(self, name: str, batch: Batch, layers: Layers) -> TeacherOutputs:
        """There is none."""
        raise NotImplementedError

    def measure(self, student: Any, batch: Batch) -> Tensor:
        """(B, 6) float64 sums of every row over masked tokens, then over masked names: cross entropy, right, count."""
        assert isinstance(batch, MaskedBatch)
        outputs = self.student_outputs(student, batch, Layers())
        masked = batch.labels != IGNORED
        place = 2 * masked.nonzero()[:, 0] + batch.is_name[masked]
        sums = torch.zeros(2 * len(batch.labels), 3, dtype=torch.float64, device=masked.device)
        inputs = outputs.hidden if isinstance(outputs, HeadOutputs) else outputs.logits  # type: ignore[union-attr]
        for part, labels, places in zip(
            *(one.split(MEASURED_ROWS) for one in (inputs, outputs.labels, place)), strict=True
        ):
            logits = (outputs.head.logits(part) if isinstance(outputs, HeadOutputs) else part).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            right = logits.argmax(dim=-1) == labels
            values = torch.stack([losses, right, torch.ones_like(losses)], dim=-1).double()
            sums.index_add_(0, places, values)
        return sums.view(len(batch.labels), 6)

    def count(self, batch: Batch) -> int:
        """Masked tokens, without names."""
        assert isinstance(batch, MaskedBatch)
        return int(((batch.labels != IGNORED) & ~batch.is_name).sum())


def masked_metrics(sums: Tensor) -> dict[str, float]:
    """Metrics out of (rows, 6) sums as `MaskedModels.measure` has them.

    Returns:
        loss (mean cross-entropy of masked tokens in nats, plus that of names), accuracy (share of masked tokens
        predicted right), and with names token_loss, name_loss and name_accuracy.
    """
    token, right, tokens, name, named, names = sums.sum(0).tolist()
    metrics = {"loss": token / tokens, "accuracy": right / tokens}
    if names:
        metrics |= {
            "loss": token / tokens + name / names,
            "token_loss": token / tokens,
            "name_loss": name / names,
            "name_accuracy": named / names,
        }
    return metrics
