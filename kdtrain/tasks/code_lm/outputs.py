"""How language models become outputs: the input of the head at every token, the head, and layers in between."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdkernels import Teacher, TeacherCrossTerm, TeacherTopK
from kdtrain.models.attention import attention_inputs
from kdtrain.models.heads import head_of, hidden_states
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.outputs import IGNORED, Batch, HeadOutputs, Layers, TeacherOutputs

NOTHING = Layers()


@dataclass(frozen=True)
class LanguageModels:
    """The models of a code_lm run."""

    teacher: LanguageTeacher | None = None
    """loaded; None for labels alone and for top-k entries that another program stored"""
    vocab_map: str | Tensor | None = None
    """how the heads line up, see `VocabularyMatch.vocab_map`"""
    tail: Literal["renormalize", "bucket"] = "bucket"
    """the rest of the distribution of stored top-k entries"""
    temperature: float = 1.0
    """of stored cross-terms"""
    dropout: bool = True

    @property
    def teachers(self) -> Mapping[str, Any]:
        """The teacher, where it runs here."""
        return {} if self.teacher is None or not self.teacher.runs_here else {"teacher": self.teacher.model}

    def student_outputs(self, student: Any, batch: Batch, layers: Layers) -> HeadOutputs:
        """The student on one micro-batch."""
        with attention_inputs(student, layers.attention) as attention:
            hidden, states = hidden_states(student, batch.input_ids, batch.positions, layers.states)
        return HeadOutputs(
            hidden=hidden,
            head=head_of(student),
            labels=batch.labels,
            token_weight=batch.token_weight,
            states=dict(zip(layers.states, states, strict=True)),
            counted=batch.labels != IGNORED,
            attention=attention,
        )

    def teacher_outputs(self, name: str, batch: Batch, layers: Layers) -> TeacherOutputs:
        """The teacher on the same micro-batch: its stored outputs where it has any, else computed now."""
        stored = batch.stored.get(name, {})
        target: Teacher
        if "logprobs" in stored:
            target = TeacherTopK(stored["logprobs"], stored["indices"], tail=self.tail)
            return TeacherOutputs(target=target, vocab_map=self.vocab_map)
        if "cross" in stored:
            target = TeacherCrossTerm(stored["cross"], stored["bias"], stored["entropy"], self.temperature)
            return TeacherOutputs(target=target, vocab_map=self.vocab_map)
        teacher = self.teacher
        assert teacher is not None
        if "hidden" in stored:
            return TeacherOutputs(target=teacher.with_hidden(stored["hidden"]), vocab_map=self.vocab_map)
        with attention_inputs(teacher.model, layers.attention) as attention:
            hidden, states = teacher.hidden(batch.input_ids, batch.positions, layers.states)
        return TeacherOutputs(
            target=teacher.with_hidden(hidden),
            vocab_map=self.vocab_map,
            states=dict(zip(layers.states, states, strict=True)),
            attention=attention,
        )

    def measure(self, student: Any, batch: Batch) -> Tensor:
        """(B, 4) float64 sums over the counted labels of every row: cross entropy, divergence, agreement, count."""
        teacher = None if self.teacher is None else self.teacher_outputs("teacher", batch, NOTHING)
        ours, theirs = self.student_outputs(student, batch, NOTHING).at_labels(teacher)
        stats = ours.statistics(theirs)
        values = torch.stack([stats.ce, stats.kd, stats.agrees, torch.ones_like(stats.ce)], dim=-1).double()
        sums = values.new_zeros(len(batch.labels), values.shape[-1])
        return sums.index_add_(0, (batch.labels != IGNORED).nonzero()[:, 0], values)

    def count(self, batch: Batch) -> int:
        """Labels that count."""
        return int((batch.labels != IGNORED).sum())

    def shared(self, student: PreTrainedModel) -> int:
        """Ids 0 to shared - 1 mean the same token to student and teacher."""
        if isinstance(self.vocab_map, Tensor):
            return int((self.vocab_map >= 0).sum())
        heads = [head_of(student)] + ([] if self.teacher is None else [self.teacher.head])
        return min(head.weight.shape[0] for head in heads)
