"""From the arguments of a logit loss to a checked problem with flat rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor

from ..core import checks
from ..core.backend import resolve_impl
from ..core.matmul import accum_dtype, autocast_dtype
from ..core.rows import RowWeights, flat, per_row, row_weights
from ..divergences import Decoupled, Divergence, resolve_divergence
from ..options import IGNORE_INDEX, Impl, Mode, Reduction, RowTerms
from ..teachers import (
    CheckedTeacher,
    Teacher,
    TeacherCrossTerm,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
)
from . import option_checks, teacher_checks
from .inputs import Given


def check_options(
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    t_squared: bool = True,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_map: str | Tensor | None = None,
    impl: Impl | None = None,
    return_stats: bool = False,
    check_finite: bool = False,
    static_shapes: bool = False,
    mode: Mode = "fast",
    chunk_bytes: int | None = None,
    vocab_group: object | None = None,
    logit_dtype: torch.dtype | None = None,
) -> RowTerms:
    """Check everything that needs no tensor; the terms of a row, still without the teacher's transform.

    Plain options are checked once for each distinct set: a training step gives the same ones as the last.
    """
    if num_items_in_batch is not None:
        checks.check_reduction(reduction, num_items_in_batch)
    option_checks.check_vocab_map_kind(vocab_map)
    option_checks.check_vocab_group(
        vocab_group,
        impl=impl,
        mode=mode,
        vocab_map=vocab_map,
        return_stats=return_stats,
        check_finite=check_finite,
    )
    plain = (
        divergence, temperature, kd_weight, ce_weight, label_smoothing, t_squared, ignore_index, reduction, softcap,
        logit_scale, impl, return_stats, check_finite, static_shapes, mode, chunk_bytes, logit_dtype,
    )  # fmt: skip
    if isinstance(divergence, Decoupled):  # whose tensors a cache would keep
        return _terms(*plain)
    try:
        return _terms_once(*plain)
    except TypeError:  # no hash: a symbolic number of a graph, or what `_terms` has a sentence for
        return _terms(*plain)


def check_stored_options(module: str, known: frozenset[str], **options: Any) -> None:
    """Check the options of a module, of which `known` are the names."""
    checks.refuse_unknown(module, options, known)
    check_options(**options)


def _terms(
    divergence: str | Divergence,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    label_smoothing: float,
    t_squared: bool,
    ignore_index: int,
    reduction: Reduction,
    softcap: float | None,
    logit_scale: float,
    impl: Impl | None,
    return_stats: bool,
    check_finite: bool,
    static_shapes: bool,
    mode: Mode,
    chunk_bytes: int | None,
    logit_dtype: torch.dtype | None,
) -> RowTerms:
    checks.check_temperature(temperature)
    checks.check_number("kd_weight", kd_weight)
    checks.check_number("ce_weight", ce_weight)
    option_checks.check_label_smoothing(label_smoothing)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_flag("t_squared", t_squared)
    checks.check_flag("return_stats", return_stats)
    checks.check_flag("check_finite", check_finite)
    checks.check_flag("static_shapes", static_shapes)
    checks.check_choice("mode", mode, get_args(Mode))
    checks.check_impl(impl)
    checks.check_choice("reduction", reduction, get_args(Reduction))
    checks.check_chunk_bytes(chunk_bytes)
    if logit_dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"logit_dtype must be None, which is float32, or torch.bfloat16, got {logit_dtype!r}"
        )
    return RowTerms(
        resolve_divergence(divergence),
        float(temperature),
        float(kd_weight),
        float(ce_weight),
        t_squared,
        float(label_smoothing),
        student_transform=option_checks.check_transform("", "logit_scale", logit_scale, softcap),
    )


# `typed`: True and 1 are equal, and one of them is no number here.
_terms_once = lru_cache(maxsize=256, typed=True)(_terms)


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked call: everything but the student, with the leading axes flattened to N rows."""

    terms: RowTerms
    teacher: CheckedTeacher
    labels: Tensor | None  # (N,) int64
    counted: RowWeights
    decoupled: tuple[Tensor, Tensor] | None  # (N,) weights of the target and the non-target divergence
    vocab_map: int | Tensor | None
    impl: Impl
    autocast: torch.dtype | None
    return_stats: bool

    @property
    def given(self) -> Given:
        """What goes with the student's tensors into a solver."""
        return Given(self.teacher, self.labels, self.decoupled, self.vocab_map)


def prepare(
    student_name: str,
    student: Tensor,  # (..., V) or (..., D)
    vocabulary: int,
    dtype: torch.dtype,
    teacher: Teacher,
    labels: Tensor | None,
    terms: RowTerms,
    *,
    token_weight: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    vocab_map: str | Tensor | None,
    impl: Impl | None,
    return_stats: bool,
    mode: Mode = "fast",
    sharded_vocabulary: int | None = None,
) -> Problem:
    """Check the teacher, the labels and how they go together; flatten the rows and count them.

    `sharded_vocabulary` is the size of the whole, where `vocabulary` is a rank's slice of it.
    """
    cast = autocast_dtype(student)
    teacher = teacher_checks.check_teacher(teacher, same_dtype=cast is None)
    mapping = teacher_checks.check_pair(student_name, student, vocabulary, teacher, vocab_map)
    checks.check_rows(
        student_name,
        student,
        sharded_vocabulary or vocabulary,
        labels,
        token_weight,
        terms.ce_weight,
        ignore_index,
    )
    teacher_checks.check_divergence(terms.divergence, teacher, labels, student_name, student)
    option_checks.check_tiles(terms.divergence, mode, sharded_vocabulary is not None)
    if isinstance(teacher, TeacherHead):
        transform = option_checks.check_transform("TeacherHead.", "scale", teacher.scale, teacher.softcap)
        terms = replace(terms, teacher_transform=transform)
    if sharded_vocabulary is not None and isinstance(teacher, TeacherTopK | TeacherCrossTerm):
        raise NotImplementedError(
            f"vocab_group is not supported yet with {type(teacher).__name__}; use TeacherHead or TeacherLogits"
        )
    if return_stats and isinstance(teacher, TeacherTopK | TeacherCrossTerm):
        raise NotImplementedError(
            f"return_stats is not supported yet with {type(teacher).__name__}; leave it at False"
        )
    if mode == "low_memory":
        option_checks.check_low_memory(teacher, mapping, return_stats)
    impl = resolve_impl(impl, student.device, dtype)

    rows = student.numel() // max(student.shape[-1], 1)
    device, wide = student.device, accum_dtype(student.dtype)
    labels = None if labels is None else labels.reshape(-1).long()
    token_weight = None if token_weight is None else token_weight.reshape(-1)
    counts = None if labels is None else labels != ignore_index
    counted = row_weights(rows, counts, token_weight, num_items_in_batch, device, wide)
    decoupled = None
    if isinstance(terms.divergence, Decoupled):
        decoupled = (
            _per_row(terms.divergence.target, rows, device, wide),
            _per_row(terms.divergence.non_target, rows, device, wide),
        )
        terms = replace(terms, divergence=Decoupled())
    teacher = _flat_teacher(teacher)
    if isinstance(teacher, TeacherTopK):
        teacher = _without_masked_entries(teacher, counted.weight)
        teacher_checks.check_ids(teacher, vocabulary)
    return Problem(terms, teacher, labels, counted, decoupled, mapping, impl, cast, return_stats)


def _per_row(value: float | Tensor, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N,) from a number or from one value per token."""
    if isinstance(value, Tensor):
        return per_row(value, dtype)
    return torch.full((rows,), float(value), dtype=dtype, device=device)


def _without_masked_entries(teacher: TeacherTopK, weight: Tensor | None) -> TeacherTopK:
    """Masked rows may hold garbage ids; replace them by 0..K-1 so that gathers stay in bounds."""
    if weight is None:
        return teacher
    masked = (weight == 0).unsqueeze(1)
    free = torch.arange(teacher.indices.shape[1], device=teacher.indices.device)
    return replace(
        teacher,
        # Half of the probability is kept, so that the bucket has the other half.
        logprobs=teacher.logprobs.masked_fill(masked, -math.log(2.0 * teacher.indices.shape[1])),
        indices=torch.where(masked, free, teacher.indices),
    )


def _flat_teacher(teacher: CheckedTeacher) -> CheckedTeacher:
    """The same teacher with rows on one axis."""
    if isinstance(teacher, TeacherLogits):
        return replace(teacher, logits=flat(teacher.logits))
    if isinstance(teacher, TeacherHead):
        return replace(teacher, hidden=flat(teacher.hidden))
    if isinstance(teacher, TeacherTopK):
        return replace(teacher, logprobs=flat(teacher.logprobs), indices=flat(teacher.indices).long())
    return replace(
        teacher,
        cross=flat(teacher.cross),
        bias=teacher.bias.reshape(-1),
        entropy=teacher.entropy.reshape(-1),
    )
