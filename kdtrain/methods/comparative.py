"""Comparative knowledge distillation (Wilf et al., WACV 2025, arXiv 2311.02253): the teacher's differences between samples."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Needs, Step
from kdtrain.methods.batch_states import whole_batch_sum
from kdtrain.methods.kd import KDOptions, LogitTerms, Weight
from kdtrain.outputs import IGNORED, Batch, LogitOutputs, LogitTerm, Outputs, Shared, TeacherOutputs


class ComparativeDistillation(LogitTerms):
    """The terms of kd, and squared errors of the differences between samples, on logits z and one-hot labels y:

    `difference_weight * mean ||(z_s^A - z_s^B) - (z_t^A - z_t^B)||^2 / C + label_weight * mean ||(z_s^A - z_s^B) - (y^A - y^B)||^2 / C`

    With `groups: pairs` the mean runs over all ordered pairs of rows of the batch. With d = z_s - z_t it equals
    `2 * (mean |d|^2 - |mean d|^2) / C`, so it costs O(B C). With `groups: sampled` A and B are the means of 1 and
    `group_size - 1` rows, drawn from the batch by the number of the step; the paper uses 2 or 3 rows.
    Rows without a label have no part in the second term. No text of the paper gives the weights: 1 and 1 are those of the
    authors' code.
    """

    # Only a classifier has logits.
    tasks = frozenset({"classification"})

    class Options(KDOptions):
        """Differences between samples."""

        name: Literal["comparative"] = "comparative"
        kd_weight: Weight = Field(default=0.0, description="weight of the divergence")
        ce_weight: Weight = Field(default=0.0, description="weight of the cross entropy with the labels")
        difference_weight: Weight = Field(
            default=1.0, description="weight of the differences of the teacher's logits"
        )
        label_weight: Weight = Field(default=1.0, description="weight of the differences of the labels")
        groups: Literal["pairs", "sampled"] = Field(
            default="pairs", description="all pairs of rows of a batch, or groups drawn from it"
        )
        group_size: Literal[2, 3] = Field(
            default=2, description="rows of both groups together (groups: sampled)"
        )

    def needs(self) -> Needs:
        """The logits of the whole batch."""
        return Needs(whole_batch=True)

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce, difference and label."""
        own = {"difference": self.options.difference_weight, "label": self.options.label_weight}
        return {**super().weights(step), **own}

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """Errors of the logits against the teacher and against the labels, and which rows have a label."""
        (teacher,) = teachers.values()
        against_teacher, against_labels = errors(student, teacher)
        return {"teacher": against_teacher, "labels": against_labels, "labelled": batch.labels != IGNORED}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce, difference and label."""
        (teacher,) = teachers.values()
        against_teacher, against_labels = errors(student, teacher)
        everybody = torch.ones_like(batch.whole["labelled"].values)
        return {
            **super().terms(step, batch, student, teachers),
            "difference": self.spread(against_teacher, batch.whole["teacher"], everybody, step),
            "label": self.spread(against_labels, batch.whole["labels"], batch.whole["labelled"].values, step),
        }

    def spread(self, own: Tensor, shared: Shared, counted: Tensor, step: Step) -> Tensor:
        """The mean squared difference of errors (R, C) between groups of counted rows, as a sum over the batch."""
        error = shared.with_own(own)[counted]
        if len(error) < self.options.group_size:
            return own.sum() * 0.0
        if self.options.groups == "pairs":
            mean = 2 * error.var(dim=0, correction=0).mean()
        else:
            generator = torch.Generator().manual_seed(step.number)
            order = torch.randperm(len(error), generator=generator).to(error.device)
            size = self.options.group_size
            groups = error[order[: len(error) // size * size]].unflatten(0, (-1, size))
            mean = (groups[:, 0] - groups[:, 1:].mean(dim=1)).square().mean()
        return whole_batch_sum(mean, shared)


def errors(student: Outputs, teacher: TeacherOutputs) -> tuple[Tensor, Tensor]:
    """Logits minus those of the teacher, and minus the one-hot labels, (B, C) each."""
    assert isinstance(student, LogitOutputs)
    logits = student.logits
    labels = F.one_hot(student.labels.clamp_min(0), logits.shape[1]).to(logits.dtype)
    return logits - teacher.logits, logits - labels
