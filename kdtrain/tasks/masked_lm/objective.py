"""The loss of a masked language model: hidden tokens and, where there are any, hidden exception names."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkernels import linear_kd_loss
from kdtrain.data.tokens import token_budget_batches
from kdtrain.models.masked_heads import hidden_tokens, masked_head
from kdtrain.tasks.base import Objective
from kdtrain.tasks.code_lm.metrics import silent_teacher
from kdtrain.tasks.masked_lm.rows import IGNORED, Hiding, MaskedBatch, MaskedRows

EVALUATION_TOKENS = 8192
MEASURED_ROWS = 1024
"""rows of logits held at a time while measuring"""


class MaskedObjective(Objective):
    """Mean cross-entropy of the hidden tokens, plus that of the hidden names.

    Without dropout, as large corpora are seen few times: the model's own rates are for the fine-tuning after it.
    """

    def __init__(self, student: PreTrainedModel, hiding: Hiding, *, names: bool) -> None:
        super().__init__()
        self.student = student
        self.hiding = hiding
        self.names = ("token", "name") if names else ("token",)
        self.step = 0

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, which turns dropout off and nothing else."""
        return super().train(False)

    def start_step(self, step: int, total_steps: int) -> None:
        """The step decides which tokens are hidden; 0 is for measuring."""
        self.step = step + 1

    def look_ahead(
        self,
        pieces: Iterable[Any],
        rows: Sequence[Tensor],
        whole: Tensor,
        divisor: int,
        accelerator: Accelerator,
    ) -> tuple[Iterable[Any], int]:
        """Hide tokens of every piece and take it to the device."""
        scale = divisor / (2 * len(whole)) if "name" in self.names else 0.0
        return (
            self.prepared(
                replace(piece, name_scale=scale),
                (index if len(index) else whole[:1]).tolist(),
                self.step,
                accelerator.device,
            )
            for piece, index in zip(pieces, rows, strict=True)
        ), divisor

    def prepared(
        self, batch: MaskedBatch, rows: Sequence[int], step: int, device: torch.device
    ) -> MaskedBatch:
        """A piece with tokens hidden, on the device."""
        hidden = self.hiding.apply(batch, rows, step)
        tensors = (hidden.input_ids, hidden.attention_mask, hidden.labels, hidden.is_name)
        return MaskedBatch(*(tensor.to(device) for tensor in tensors), name_scale=hidden.name_scale)

    def forward(self, batch: MaskedBatch, divisor: int, *, measure: bool = False) -> tuple[Tensor, Tensor]:
        """Loss of one piece and the sum of each term; with `measure` the sums of `masked_metrics`, (6,), in their place."""
        predicted = batch.labels != IGNORED
        targets, is_name = batch.labels[predicted], batch.is_name[predicted]
        head = masked_head(self.student)
        if head is None:  # a family of its own: all tokens go through its head
            whole = self.student(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            outputs, decode = whole.logits[predicted], torch.Tensor.float
        else:
            hidden = hidden_tokens(self.student, batch.input_ids, batch.attention_mask, predicted)
            outputs, decode = head.transform(hidden), head.decoder
        if measure:
            return outputs.new_zeros(()), measured(outputs, decode, targets, is_name)
        if head is None:
            losses = F.cross_entropy(outputs.float(), targets, reduction="none")
            token, name = losses[~is_name].sum(), losses[is_name].sum()
        else:
            token = decoded_loss(outputs[~is_name], head.decoder, targets[~is_name])
            name = token.new_zeros(())
            if "name" in self.names:
                name = decoded_loss(outputs[is_name], head.decoder, targets[is_name])
        name = name * batch.name_scale
        return (token + name) / divisor, torch.stack([token, name][: len(self.names)]).detach()


def decoded_loss(hidden: Tensor, decoder: nn.Linear, targets: Tensor) -> Tensor:
    """Sum of F.cross_entropy(decoder(hidden), targets), of which the logits exist for some rows at a time."""
    nobody = silent_teacher(hidden, decoder.weight.shape[0])  # is not read
    return linear_kd_loss(
        hidden,
        decoder.weight,
        nobody,
        targets,
        student_bias=decoder.bias,
        kd_weight=0.0,
        ce_weight=1.0,
        reduction="sum",
    )


def measured(outputs: Tensor, decode: Callable[[Tensor], Tensor], targets: Tensor, is_name: Tensor) -> Tensor:
    """(6,) float64 sums over hidden tokens, then over names: cross entropy, told right, count."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=outputs.device)
    for rows, labels, side in zip(
        *(part.split(MEASURED_ROWS) for part in (outputs, targets, is_name)), strict=True
    ):
        logits = decode(rows).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        right = logits.argmax(dim=-1) == labels
        values = torch.stack([losses, right, torch.ones_like(losses)], dim=-1).double()
        sums.index_add_(0, side.long(), values)
    return sums.flatten()


@torch.no_grad()
def masked_metrics(
    model: nn.Module, objective: MaskedObjective, rows: MaskedRows, accelerator: Accelerator
) -> dict[str, float]:
    """Held-out metrics of the model as accelerate wrapped it; the same tokens are hidden each time.

    Returns:
        loss (mean cross-entropy of hidden tokens in nats, plus that of names), accuracy (share of hidden tokens told
        right), and with names token_loss, name_loss and names_right.
    """
    model.eval()
    batches = token_budget_batches(rows.lengths, EVALUATION_TOKENS)
    count, first = accelerator.num_processes, accelerator.process_index
    sums = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(batches), count):  # every process runs as many, or FSDP2 would wait for ever
        index = batches[min(start + first, len(batches) - 1)]
        batch = objective.prepared(
            rows.batch(index, accelerator.device), index.tolist(), 0, accelerator.device
        )
        _, part = model(batch, 1, measure=True)
        sums += part * (start + first < len(batches))
    token, right, tokens, name, named, names = accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
    metrics = {"loss": token / tokens, "accuracy": right / tokens}
    if names:
        metrics |= {
            "loss": token / tokens + name / names,
            "token_loss": token / tokens,
            "name_loss": name / names,
            "names_right": named / names,
        }
    return metrics
