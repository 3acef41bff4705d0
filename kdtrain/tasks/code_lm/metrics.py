"""Held-out measures of a language model: cross entropy, divergence from the teacher, agreement. Logits never exist whole."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdkernels import TeacherHead, TeacherLogits, linear_kd_loss
from kdtrain.data.tokens import token_budget_batches
from kdtrain.models.heads import head_of, hidden_states
from kdtrain.tasks.base import TrainingData
from kdtrain.tasks.code_lm.packing import IGNORED, LanguageBatch

if TYPE_CHECKING:
    from kdtrain.tasks.code_lm.objective import LanguageObjective

EVALUATION_TOKENS = 4096


@torch.no_grad()
def language_metrics(
    model: nn.Module, data: TrainingData, accelerator: Accelerator, *, teacher: bool
) -> dict[str, float]:
    """Metrics of the model as accelerate wrapped it; processes share the rows and all get the same numbers.

    Returns:
        loss (mean cross entropy in nats of the counted tokens), perplexity, and with a teacher divergence (forward KL
        at temperature 1, mean over the tokens) and agreement (share of tokens with the same best token).
    """
    model.eval()
    batches = token_budget_batches(data.lengths, EVALUATION_TOKENS)
    count, first = accelerator.num_processes, accelerator.process_index
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(batches), count):  # every process runs as many, or FSDP2 would wait for ever
        index = batches[min(start + first, len(batches) - 1)]
        _, part = model(data.batch(index, accelerator.device), 1, measure=True)
        sums += part * (start + first < len(batches))
    sums = accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
    loss = sums[0] / sums[3]
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}
    if teacher:
        metrics |= {"divergence": sums[1] / sums[3], "agreement": sums[2] / sums[3]}
    return metrics


def measured_rows(objective: "LanguageObjective", batch: LanguageBatch) -> Tensor:
    """(B, 4) float64, as `row_sums`, of a batch that has not been through the student yet."""
    hidden, _ = hidden_states(objective.student, batch.input_ids, batch.position_ids)
    return row_sums(objective, hidden, objective.teacher_head(batch)[0], batch.labels)


def token_sums(
    objective: "LanguageObjective", hidden: Tensor, teacher: TeacherHead | None, labels: Tensor
) -> Tensor:
    """(4,) float64 sums over counted labels: cross entropy, divergence, agreement, count."""
    return row_sums(objective, hidden, teacher, labels).sum(0)


def row_sums(
    objective: "LanguageObjective", hidden: Tensor, teacher: TeacherHead | None, labels: Tensor
) -> Tensor:
    """(B, 4) float64, the same sums for each row on its own."""
    head = head_of(objective.student)
    counted = labels != IGNORED
    hidden = hidden[counted].to(head.weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        _, stats = linear_kd_loss(
            hidden,
            head.weight,
            silent_teacher(hidden, head.weight.shape[0])
            if teacher is None
            else replace(teacher, hidden=teacher.hidden[counted]),
            labels[counted],
            student_bias=head.bias,
            ce_weight=1.0,
            softcap=head.softcap,
            logit_scale=head.scale,
            vocab_map=None if teacher is None else objective.vocab_map,
            reduction="sum",
            return_stats=True,
        )
    values = torch.stack([stats.ce, stats.kd, stats.agrees, torch.ones_like(stats.ce)], dim=-1).double()
    sums = values.new_zeros(len(labels), values.shape[-1])
    return sums.index_add_(0, counted.nonzero()[:, 0], values)


def silent_teacher(hidden: Tensor, vocabulary: int) -> TeacherLogits:
    """Stands in where there is no teacher: one number seen as (..., V), so that it costs no memory."""
    return TeacherLogits(hidden.detach().new_zeros(()).expand(*hidden.shape[:-1], vocabulary))
