"""One micro-batch of any task, and what models make of it: states of layers, and terms over logits.

A term over logits is lazy: a method says what it wants (`student.divergence(teacher, ...)`), and the student's outputs
evaluate all terms together, so that divergence and cross entropy of a language model are one fused call.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import (
    Decoupled,
    Divergence,
    KDStats,
    Teacher,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from kdtrain.models.attention import AttentionInputs
from kdtrain.models.heads import Head

IGNORED = -100
"""The label of a position that has none."""

Values = dict[str, Tensor]
"""Detached, unweighted sums of terms, by name."""


@dataclass(frozen=True)
class Layers:
    """Layers of one model that methods read; 0 is the embeddings."""

    states: tuple[int, ...] = ()
    """a state for every position"""
    tokens: tuple[int, ...] = ()
    """the states of every token"""
    attention: tuple[int, ...] = ()
    """the inputs of attention"""

    @property
    def all_states(self) -> tuple[int, ...]:
        """Layers whose outputs are read in either form, ascending."""
        return tuple(sorted({*self.states, *self.tokens}))


@dataclass(frozen=True)
class Shared:
    """A tensor that micro-batches share: every row of the whole batch, over all micro-batches and processes."""

    values: Tensor
    """(R, ...), without a graph"""
    places: Tensor
    """(r,) int64, which of those rows this micro-batch computed"""

    def with_own(self, own: Tensor) -> Tensor:
        """The values with the rows of this micro-batch taken from `own`, which may have a graph."""
        return self.values.to(own.dtype).index_copy(0, self.places, own)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of any task, on the device."""

    input_ids: Tensor
    """(B, N) int64; (B, 2, N) for pairs of texts"""
    labels: Tensor
    """(B,) for tasks that label rows, (B, N) for tasks that label tokens (already shifted); `IGNORED` where there is none"""
    rows: Tensor
    """(B,) int64 on the host: row numbers"""
    attention_mask: Tensor | None = None
    """as input_ids"""
    position_ids: Tensor | None = None
    """(B, N) int64, 0 at the first token of every document of a packed row"""
    token_weight: Tensor | None = None
    """float32, of the shape of `labels`: the weight of each position in every term over logits"""
    route: tuple[str, ...] | None = None
    """by row: the name of its teacher, where the data names one"""
    stored: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """by teacher: its stored outputs of these rows, by name"""
    whole: Mapping[str, Shared] = field(default_factory=dict)
    """the tensors that the method at work shares over the whole batch"""

    @property
    def positions(self) -> Tensor:
        """`position_ids`, where rows hold documents."""
        assert self.position_ids is not None
        return self.position_ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """States of layers. Layer 0 is the embeddings, 1 the first layer."""

    states: Mapping[int, Tensor] = field(default_factory=dict)
    """by layer, (..., D): a state for every position (a token of a language model, a text of a classifier)"""
    counted: Tensor | None = None
    """(...) bool: the positions that count; None: all of them"""
    texts: int = 1
    """texts of a row, each with a state of its own"""
    tokens: Mapping[int, Tensor] = field(default_factory=dict)
    """by layer, (S, N, D): the states of every token of S texts"""
    token_mask: Tensor | None = None
    """(S, N) bool: tokens that are no padding"""
    attention: Mapping[int, AttentionInputs] = field(default_factory=dict)
    """by layer: the inputs of its attention"""


@dataclass(frozen=True, eq=False, kw_only=True)
class TeacherOutputs(Features):
    """A teacher on one micro-batch, computed now or stored."""

    target: Teacher
    """its distribution at every position"""
    vocab_map: str | Tensor | None = None
    """how the vocabularies of student and teacher line up, see `kdkernels.linear_kd_loss`"""

    @property
    def logits(self) -> Tensor:
        """(B, C) float32 of a classifier."""
        assert isinstance(self.target, TeacherLogits)
        return self.target.logits


@dataclass(frozen=True, eq=False)
class LogitTerm:
    """A sum over positions of a divergence from `teacher`, or of the cross entropy with the labels where that is None."""

    teacher: TeacherOutputs | None
    divergence: Divergence | str
    temperature: float
    weight: Tensor | None
    """of the shape of the labels: the weight of each position"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Outputs(Features, ABC):
    """A student on one micro-batch of any task."""

    labels: Tensor
    """of every position, `IGNORED` where there is none"""
    token_weight: Tensor | None = None
    """of every position, in all terms over logits"""

    precise = False
    """whether terms are computed outside of autocast"""

    def divergence(
        self,
        teacher: TeacherOutputs,
        divergence: Divergence | str,
        *,
        temperature: float = 1.0,
        weight: Tensor | None = None,
    ) -> LogitTerm:
        """T^2 times the divergence of the student from a teacher, summed over positions with these weights."""
        return LogitTerm(teacher, divergence, temperature, weight)

    def cross_entropy(self, *, weight: Tensor | None = None) -> LogitTerm:
        """The cross entropy with the labels at temperature 1, summed over the labelled positions with these weights."""
        return LogitTerm(None, "forward_kl", 1.0, weight)

    def total(
        self, terms: Mapping[str, Tensor | LogitTerm], weights: Mapping[str, float | Tensor], divisor: Any
    ) -> tuple[Tensor, Values]:
        """The weighted sum of all terms divided by `divisor`, 0-D, and the value of each term.

        Where one call gives two terms without telling them apart, their weighted sum has one name of both.
        """
        lazy = {name: term for name, term in terms.items() if isinstance(term, LogitTerm)}
        loss, values = self.logit_terms(lazy, weights, divisor)
        for name, term in terms.items():
            if isinstance(term, Tensor):
                loss = loss + weights[name] * term / divisor
                values[name] = term.detach()
        named = {name: values.pop(name) for name in terms if name in values}
        return loss, values | named

    @abstractmethod
    def logit_terms(
        self, terms: Mapping[str, LogitTerm], weights: Mapping[str, float | Tensor], divisor: Any
    ) -> tuple[Tensor, Values]:
        """As `total`, of terms over logits alone."""

    @abstractmethod
    def statistics(self, teacher: TeacherOutputs | None = None) -> KDStats:
        """Statistics of every position, detached: cross entropy, entropies, agreement and, with a teacher, forward KL."""

    def position_weight(self, term: LogitTerm) -> Tensor | None:
        """The weight of each position in a term."""
        if self.token_weight is None or term.weight is None:
            return self.token_weight if term.weight is None else term.weight
        return self.token_weight * term.weight


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitOutputs(Outputs):
    """A student whose logits exist: a classifier, or a language model whose head is not known."""

    logits: Tensor
    """(..., C) float32"""

    precise = True

    def logit_terms(
        self, terms: Mapping[str, LogitTerm], weights: Mapping[str, float | Tensor], divisor: Any
    ) -> tuple[Tensor, Values]:
        """Each term by itself. Rows without a label have divergences only."""
        loss, values = self.logits.new_zeros(()), {}
        for name, term in terms.items():
            weight = self.position_weight(term)
            if term.teacher is None:
                losses = F.cross_entropy(
                    self.logits,
                    self.labels,
                    ignore_index=IGNORED,
                    reduction="sum" if weight is None else "none",
                )
                value = losses if weight is None else (losses * weight).sum()
            else:
                value = kd_loss(
                    self.logits,
                    term.teacher.target,
                    self.labels if isinstance(term.divergence, Decoupled) else None,
                    divergence=term.divergence,
                    temperature=term.temperature,
                    token_weight=weight,
                    vocab_map=term.teacher.vocab_map,
                    reduction="sum",
                )
            loss = loss + weights[name] * value
            values[name] = value.detach()
        return loss / divisor, values

    @torch.no_grad()
    def statistics(self, teacher: TeacherOutputs | None = None) -> KDStats:
        """As `Outputs.statistics`."""
        target = no_teacher(self.logits, self.logits.shape[-1]) if teacher is None else teacher.target
        vocab_map = None if teacher is None else teacher.vocab_map
        _, stats = kd_loss(
            self.logits,
            target,
            self.labels,
            ce_weight=1.0,
            reduction="sum",
            vocab_map=vocab_map,
            return_stats=True,
        )
        return stats


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadOutputs(Outputs):
    """A student as hidden states and head: the logits never exist as a whole."""

    hidden: Tensor
    """(..., D), the input of the head"""
    head: Head

    def logit_terms(
        self, terms: Mapping[str, LogitTerm], weights: Mapping[str, float | Tensor], divisor: Any
    ) -> tuple[Tensor, Values]:
        """Each divergence in one call with a cross entropy of the same weights, over positions with a label."""
        entropies = {name: term for name, term in terms.items() if term.teacher is None}
        loss, values = self.hidden.new_zeros((), dtype=torch.float32), {}
        for name, term in terms.items():
            if term.teacher is None:
                continue
            partner = next((other for other, ce in entropies.items() if ce.weight is term.weight), None)
            if partner is not None:
                del entropies[partner]
            value, found = self._fused(
                name, term, weights[name], partner, weights.get(partner or "", 0.0), divisor
            )
            loss = loss + value
            values |= found
        for name, term in entropies.items():
            value = self._loss(term, no_teacher(self.hidden, len(self.head.weight)), divisor)(
                kd_weight=0.0, ce_weight=1.0
            )
            loss = loss + (value if weights[name] == 1.0 else weights[name] * value)
            values[name] = value.detach() * divisor
        return loss, values

    def _loss(self, term: LogitTerm, target: Teacher, divisor: Any) -> "partial[Any]":
        return partial(
            linear_kd_loss,
            self.hidden,
            self.head.weight,
            target,
            self.labels,
            student_bias=self.head.bias,
            token_weight=self.position_weight(term),
            num_items_in_batch=divisor,
            softcap=self.head.softcap,
            logit_scale=self.head.scale,
        )

    def _fused(
        self,
        name: str,
        term: LogitTerm,
        weight: float | Tensor,
        partner: str | None,
        partner_weight: float | Tensor,
        divisor: Any,
    ) -> tuple[Tensor, Values]:
        """A divergence, and the cross entropy called `partner`, in one call: weighted sum over divisor, and values."""
        assert term.teacher is not None
        teacher = term.teacher
        call = partial(
            self._loss(term, teacher.target, divisor),
            divergence=term.divergence,
            temperature=term.temperature,
            kd_weight=float(weight),
            ce_weight=float(partner_weight),
            # Stored entries were stored of the shared tokens already.
            vocab_map=teacher.vocab_map if isinstance(teacher.target, TeacherHead) else None,
        )
        # Statistics cost passes over the logits: not where the sum of both is what is reported.
        if isinstance(teacher.target, TeacherTopK | TeacherCrossTerm):
            loss = call()
            return loss, {name if partner is None else f"{name}_and_{partner}": loss.detach() * divisor}
        loss, stats = call(return_stats=True)
        position_weight = self.position_weight(term)
        weight_of = 1.0 if position_weight is None else position_weight
        values = {name: term.temperature**2 * (stats.kd * weight_of).sum()}
        if partner is not None:
            values[partner] = (stats.ce * weight_of).sum()
        return loss, values

    @torch.no_grad()
    def statistics(self, teacher: TeacherOutputs | None = None) -> KDStats:
        """As `Outputs.statistics`, of the hidden states in the precision of the head."""
        target = no_teacher(self.hidden, len(self.head.weight)) if teacher is None else teacher.target
        with torch.autocast(self.hidden.device.type, enabled=False):
            _, stats = linear_kd_loss(
                self.hidden.to(self.head.weight.dtype),
                self.head.weight,
                target,
                self.labels,
                student_bias=self.head.bias,
                ce_weight=1.0,
                softcap=self.head.softcap,
                logit_scale=self.head.scale,
                vocab_map=None if teacher is None else teacher.vocab_map,
                reduction="sum",
                return_stats=True,
            )
        return stats

    def at_labels(self, teacher: TeacherOutputs | None) -> tuple["HeadOutputs", TeacherOutputs | None]:
        """Both sides at the labelled positions alone, so that statistics read no others."""
        counted = self.labels != IGNORED
        if teacher is not None:
            assert isinstance(teacher.target, TeacherHead)
            target = replace(teacher.target, hidden=teacher.target.hidden[counted])
            teacher = TeacherOutputs(target=target, vocab_map=teacher.vocab_map)
        weight = None if self.token_weight is None else self.token_weight[counted]
        student = HeadOutputs(
            hidden=self.hidden[counted], head=self.head, labels=self.labels[counted], token_weight=weight
        )
        return student, teacher


def no_teacher(student: Tensor, vocabulary: int) -> TeacherLogits:
    """A placeholder where there is no teacher: one number expanded to (..., V), which takes no memory."""
    return TeacherLogits(student.detach().new_zeros(()).expand(*student.shape[:-1], vocabulary))
