"""Teachers that are a few numbers per token (a top k, the cross-term of a frozen head), or none.

Of a row of student logits such a loss needs its log-sum-exps, and its gradient is a multiple of the row's softmax except
at a few entries. So a back end supplies just that (`row_statistics`, `softmax_gradient`), and all that has the size
of K is done here, once for all of them.

A top k is two distributions over K + 1 categories, the top-k entries and all others together. The top-k logits are
gathered and masked out of the row first: the rest of the row is then the last category, and is never computed as 1 - sum.
The divergence of K + 1 categories and its derivatives are those of K + 1 logits in the torch back end, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.backend import Backend, load_backend
from ..core.labels import cross_entropy, target_shares
from ..core.matmul import accum_dtype
from ..core.rows import ids_in_range
from ..core.transform import transformed_logits
from ..options import LogitTransform, RowTerms
from ..reference.sparse import log_bucket
from ..teachers import Tail


def _upcast(
    logits: Tensor, bias: Tensor | None, transform: LogitTransform, grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits and the memory for their gradient; half-precision logits with a bias or transform go to float32.

    So the transform is computed in float32, and the gradient is rounded once, when it is finished.
    """
    wide = accum_dtype(logits.dtype)
    if logits.dtype == wide or (bias is None and transform.is_identity):
        return logits, grad
    logits = logits.to(wide)
    return logits, None if grad is None else logits


@dataclass
class _Rows:
    """A chunk of student logits, transformed, and what the cross entropy needs of it before top-k entries are masked out."""

    backend: Backend
    logits: Tensor  # (R, V), overwritten
    terms: RowTerms
    grad: Tensor | None  # (R, V), may alias the logits
    rounded: Tensor | None  # (R, V) the gradient in the dtype asked for; `grad` itself where that is the same
    labels: Tensor | None  # (R, 1), only with a cross entropy
    label_logit: Tensor | None  # (R, 1)
    mean: Tensor | None  # (R,) of the logits in float64, for label smoothing
    derivative: Tensor | None  # (R, V) of the softcap
    masked: Tensor | None  # (R, 1) rows of weight 0
    row_weight: Tensor | None

    @staticmethod
    def make(
        backend: Backend,
        logits: Tensor,
        terms: RowTerms,
        labels: Tensor | None,
        bias: Tensor | None,
        row_weight: Tensor | None,
        grad: Tensor | None,
    ) -> _Rows:
        rounded = grad
        logits, grad = _upcast(logits, bias, terms.student_transform, grad)
        derivative = None
        if grad is not None and terms.student_transform.softcap is not None:
            derivative = torch.empty_like(logits)
        transformed_logits(logits, bias, terms.student_transform, logits, derivative)
        masked = None if row_weight is None else (row_weight == 0).unsqueeze(1)
        if derivative is not None and masked is not None:
            derivative.masked_fill_(
                masked, 0.0
            )  # NaN in a row that holds NaN, and so would be its gradient of 0
        label_logit = mean = None
        labels = None if labels is None or terms.ce_weight == 0.0 else labels.unsqueeze(1)
        if labels is not None:
            labels = labels if masked is None else labels.masked_fill(masked, 0)
            labels, outside = ids_in_range(labels, logits.shape[1])
            label_logit = _zero_masked(logits.gather(1, labels).to(accum_dtype(logits.dtype)), masked)
            label_logit = label_logit.masked_fill(outside, math.nan)
            if terms.label_smoothing != 0.0:
                mean = _zero_masked(logits.sum(1, keepdim=True, dtype=torch.float64), masked).squeeze(1)
                mean /= logits.shape[1]
        return _Rows(
            backend, logits, terms, grad, rounded, labels, label_logit, mean, derivative, masked, row_weight
        )

    def statistics(self, temperature: float) -> Tensor:
        """(3, R) reference and log-sum-exps of the logits as they are now, see `Backend.row_statistics`."""
        return self.backend.row_statistics(
            self.logits,
            temperature=temperature,
            at_one=self.labels is not None,
            row_weight=self.row_weight,
        )

    def cross_entropy(self, reference: Tensor, log_sum: Tensor) -> Tensor:
        """(R,) from the log-sum-exp at temperature 1, relative to `reference`."""
        if self.label_logit is None:
            return torch.zeros_like(log_sum)
        mean = None if self.mean is None else (self.mean - reference).to(log_sum.dtype)
        label = self.label_logit.squeeze(1) - reference
        value = cross_entropy(log_sum, label, mean, self.terms.label_smoothing)
        return value if self.masked is None else value.masked_fill(self.masked.squeeze(1), 0.0)

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(R,) of the divergence, of the cross entropy's softmax, and the constant of its smoothing."""
        terms, wide = self.terms, accum_dtype(self.logits.dtype)
        unit = self.row_weight
        if unit is None:
            unit = torch.ones(self.logits.shape[0], dtype=wide, device=self.logits.device)
        scaled = unit.to(wide) * terms.student_transform.scale
        if self.labels is None:
            return scaled * terms.kd_scale, None, None
        of_ce = scaled * terms.ce_weight
        _, everywhere = target_shares(terms.label_smoothing, self.logits.shape[1])
        return scaled * terms.kd_scale, of_ce, None if everywhere == 0.0 else of_ce * -everywhere

    def label_entry(
        self, of_kd: Tensor | None, reference: Tensor, log_sum: Tensor, of_ce: Tensor, constant: Tensor | None
    ) -> Tensor:
        """(R, 1) the gradient at the label: the part of the divergence, and softmax minus target of the cross entropy.

        `log_sum` is of all logits at temperature 1, relative to `reference`; `of_ce` and `constant` are those of `factors`.
        """
        assert self.label_logit is not None
        entry = _softmax_entries(self.label_logit - reference.unsqueeze(1), log_sum, of_ce)
        entry = entry if of_kd is None else of_kd + entry
        at_label, _ = target_shares(self.terms.label_smoothing, self.logits.shape[1])
        entry = entry - (at_label * of_ce).unsqueeze(1)
        return entry if constant is None else entry + constant.unsqueeze(1)

    def write_gradient(self, statistics: Tensor, temperature: float, factor: Tensor | None) -> None:
        """The gradient of factor (R,) * log sum exp(logits / T) * T and of the cross entropy; without a factor of that alone."""
        if self.grad is None:
            return
        reference, log_sum, log_sum_at_one = statistics
        _, of_ce, constant = self.factors()
        first, second = (of_ce, None) if factor is None else (factor, of_ce)
        assert first is not None
        self.backend.softmax_gradient(
            self.logits, statistics, first, second, constant, temperature=temperature, grad=self.grad
        )
        entry = None
        if self.label_logit is not None and of_ce is not None:
            of_kd = None
            if factor is not None:
                label = (self.label_logit - reference.unsqueeze(1)) / temperature
                of_kd = _softmax_entries(label, log_sum, factor)
            entry = self.label_entry(of_kd, reference, log_sum_at_one, of_ce, constant)
        self.finish(self.grad, entry)

    def finish(self, grad: Tensor, entries: Tensor | None) -> None:
        """Put the label's entry (R, 1) into the gradient, go back through the softcap, and round it where that is due."""
        if entries is not None and self.labels is not None:
            grad.scatter_(1, self.labels, entries.to(grad.dtype))
        if self.derivative is not None:
            grad.mul_(self.derivative)
        if self.rounded is not None and self.rounded is not grad:
            self.rounded.copy_(grad)


def _zero_masked(tensor: Tensor, masked: Tensor | None) -> Tensor:
    return tensor if masked is None else tensor.masked_fill(masked, 0.0)


def _softmax_entries(logits: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
    """(R, K) factor * exp(logits - log_sum), with (R,) factor and log_sum."""
    return factor.unsqueeze(1) * (logits - log_sum.unsqueeze(1)).exp()


def top_k_rows(
    backend: Backend,
    logits: Tensor,  # (R, V) of the student before bias and transform, overwritten
    logprobs: Tensor,  # (R, K)
    indices: Tensor,  # (R, K)
    tail: Tail,
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,  # (R, V), may alias the logits
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,), and into `grad` their weighted gradient, as `Backend.kd_rows`."""
    rows = _Rows.make(backend, logits, terms, labels, bias, row_weight, grad)
    logits, grad, wide = rows.logits, rows.grad, accum_dtype(rows.logits.dtype)
    indices, outside = ids_in_range(indices, logits.shape[1])
    logprobs = logprobs.masked_fill(outside, math.nan)
    is_entry = logprobs > -math.inf
    raw = logits.gather(1, indices)
    logits.scatter_(1, indices, raw.masked_fill(is_entry, -math.inf))
    student = _zero_masked(raw.to(wide), rows.masked).masked_fill(~is_entry, -math.inf)
    teacher = _zero_masked(logprobs.double(), rows.masked)

    # Tempered before the other ids are put together, or after: that is the difference of the two tails.
    bucket = tail == "bucket"
    temperature = 1.0 if bucket else terms.temperature
    statistics = rows.statistics(temperature)
    # All logits are relative to the largest of the row, top-k entry or not.
    reference = torch.maximum(student.amax(1), statistics[0])
    reference = torch.where(statistics[1] == -math.inf, student.amax(1), reference)
    student = student - reference.unsqueeze(1)
    move = (statistics[0] - reference).masked_fill(statistics[1] == -math.inf, 0.0)
    others = statistics[1] + move / temperature
    kd, of_entries, of_others = _categories(student, others, teacher, bucket, logits.shape[1], terms)
    log_sum = torch.logaddexp(statistics[2] + move, student.logsumexp(1))
    ce = rows.cross_entropy(reference, log_sum)
    if rows.masked is not None:  # the derivative, too: it may be infinite, which a factor of 0 would not stop
        masked = rows.masked.squeeze(1)
        kd, of_others = kd.masked_fill(masked, 0.0), of_others.masked_fill(masked, 0.0)
        of_entries = of_entries.masked_fill(rows.masked, 0.0)
    if grad is None:
        return kd.to(wide), ce

    of_kd, of_ce, constant = rows.factors()
    nothing = others == -math.inf
    factor = (of_kd * of_others).masked_fill(nothing, 0.0)
    statistics[1].masked_fill_(nothing, 0.0)
    statistics[2] = log_sum - move
    backend.softmax_gradient(logits, statistics, factor, of_ce, constant, temperature=temperature, grad=grad)

    entries = of_kd.unsqueeze(1) * of_entries
    if of_ce is not None:
        entries = entries + _softmax_entries(student, log_sum, of_ce)
    if constant is not None:
        entries = entries + constant.unsqueeze(1)
    # An entry of -inf belongs to the other ids, which are written already.
    entries = torch.where(is_entry, entries.to(grad.dtype), grad.gather(1, indices))
    at_label = None
    if rows.labels is not None and rows.label_logit is not None and of_ce is not None:
        among = (indices == rows.labels) & is_entry
        at_label = _softmax_entries((rows.label_logit - reference.unsqueeze(1)) / temperature, others, factor)
        of_entry = (of_kd.unsqueeze(1) * of_entries).masked_fill(~among, 0.0).sum(1, keepdim=True)
        at_label = torch.where(among.any(1, keepdim=True), of_entry, at_label)
        at_label = rows.label_entry(at_label, reference, log_sum, of_ce, constant)
    grad.scatter_(1, indices, entries)
    rows.finish(grad, at_label)
    return kd.to(wide), ce


def _categories(
    student: Tensor,  # (R, K) top-k logits
    others: Tensor,  # (R,) log-sum-exp of the other ids
    teacher: Tensor,  # (R, K) log-probabilities in float64
    bucket: bool,
    vocabulary: int,
    terms: RowTerms,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of the K + 1 categories (R,), and its derivatives for the top-k logits and for `others`."""
    if bucket:
        tail = log_bucket(teacher, vocabulary)
        log_p_t = (torch.cat((teacher, tail), 1) / terms.temperature).log_softmax(1)
    else:
        log_p_t = (teacher / terms.temperature).log_softmax(1)
        log_p_t = torch.cat((log_p_t, torch.full_like(log_p_t[:, :1], -math.inf)), 1)
    # The log-sum-exp of the others is tempered already where tempering came first.
    others = others.double().unsqueeze(1)
    log_s = torch.cat(
        (student.double() / terms.temperature, others / (terms.temperature if bucket else 1.0)), 1
    )
    # Not the reference and autograd, which records nothing inside the node of a compiled graph; not the triton back end,
    # which has no float64.
    of_categories = torch.empty_like(log_s)
    kd, _ = load_backend("torch").kd_rows(
        log_s, log_p_t, None, RowTerms(terms.divergence), grad=of_categories
    )
    # Every category is tempered once; the log-sum-exp of logits / T has the derivative softmax / T.
    of_categories = (of_categories / terms.temperature).to(student.dtype)
    return kd, of_categories[:, :-1], of_categories[:, -1]


def cross_term_rows(
    backend: Backend,
    logits: Tensor,  # (R, V) of the student before bias and scale, overwritten
    mean: Tensor,  # (R,) <p_t, logits> before the scale
    entropy: Tensor,  # (R,)
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,  # (R, V), may alias the logits; without the part of the cross-term
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,); into `grad` the part of their gradient that goes through the student's softmax."""
    rows = _Rows.make(backend, logits, terms, labels, bias, row_weight, grad)
    temperature = terms.temperature
    statistics = rows.statistics(temperature)
    reference, log_sum, log_sum_at_one = statistics
    # In float64: these are as large as logits are, and their difference is not.
    mean = mean.double() * terms.student_transform.scale
    kd = log_sum.double() + (reference.double() - mean) / temperature - entropy.double()
    kd = kd if rows.masked is None else kd.masked_fill(rows.masked.squeeze(1), 0.0)
    ce = rows.cross_entropy(reference, log_sum_at_one)
    rows.write_gradient(statistics, temperature, rows.factors()[0] / temperature)
    return kd.to(accum_dtype(logits.dtype)), ce


def label_rows(
    backend: Backend,
    logits: Tensor,  # (R, V) of the student before bias and transform, overwritten where there is one of them
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,  # (R, V), may alias the logits
) -> tuple[Tensor, Tensor]:
    """0 and cross entropy (R,), and into `grad` its weighted gradient, as `Backend.kd_rows` for a divergence of weight 0."""
    nothing = logits.new_zeros(logits.shape[0], dtype=accum_dtype(logits.dtype))
    if labels is None or terms.ce_weight == 0.0:
        if grad is not None:
            grad.zero_()
        return nothing, nothing
    rows = _Rows.make(backend, logits, terms, labels, bias, row_weight, grad)
    statistics = rows.statistics(1.0)
    rows.write_gradient(statistics, 1.0, None)
    return nothing, rows.cross_entropy(statistics[0], statistics[2])
