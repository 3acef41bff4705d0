"""Teachers that are a few numbers per token (the kept entries of a top k, the cross-term of a frozen head), or none.

Of a row of student logits such a loss needs its log-sum-exps, and its gradient is a multiple of the row's softmax except
at a few entries. So a back end supplies just that (`row_statistics`, `softmax_gradient`), and all that has the size
of K is done here, once for all of them.

A top k is two distributions over K + 1 categories, the kept entries and all the others together. The kept logits are
lifted out of the row first: what is left of the row is then the last category, and is never computed as 1 - sum.
The divergence of K + 1 categories and its derivatives are those of K + 1 logits in the torch back end, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.backend import Backend, load_backend
from ..core.matmul import wide_dtype
from ..options import LogitTransform, RowTerms
from ..teachers import LEAST_REST, Tail


def transform_(
    logits: Tensor, bias: Tensor | None, transform: LogitTransform, derivative: bool
) -> Tensor | None:
    """Bias, scale and softcap in place; the softcap's part of the derivative, where it is wanted."""
    if bias is not None:
        logits.add_(bias)
    if transform.softcap is None:
        if transform.scale != 1.0:
            logits.mul_(transform.scale)
        return None
    logits.mul_(transform.scale / transform.softcap).tanh_()
    chain = torch.addcmul(logits.new_ones(()), logits, logits, value=-1.0) if derivative else None
    logits.mul_(transform.softcap)
    return chain


def _upcast(
    logits: Tensor, bias: Tensor | None, transform: LogitTransform, grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits and the memory for their gradient; half-precision logits with a bias or transform go to float32.

    So the transform is computed in float32, and the gradient is rounded once, by the caller, when it is finished.
    """
    wide = wide_dtype(logits.dtype)
    if logits.dtype == wide or (bias is None and transform.is_identity):
        return logits, grad
    logits = logits.to(wide)
    return logits, None if grad is None else logits


@dataclass
class _Rows:
    """A chunk of student logits, transformed, and what the cross entropy needs of it before entries are lifted out."""

    backend: Backend
    logits: Tensor  # (R, V), overwritten
    terms: RowTerms
    labels: Tensor | None  # (R, 1), only with a cross entropy
    label_logit: Tensor | None  # (R, 1)
    total: Tensor | None  # (R,) sum of the logits in float64, for label smoothing
    chain: Tensor | None
    dead: Tensor | None  # (R, 1)
    row_weight: Tensor | None

    @staticmethod
    def make(
        backend: Backend,
        logits: Tensor,
        terms: RowTerms,
        labels: Tensor | None,
        bias: Tensor | None,
        row_weight: Tensor | None,
        derivative: bool,
    ) -> _Rows:
        chain = transform_(logits, bias, terms.student_transform, derivative)
        dead = None if row_weight is None else (row_weight == 0).unsqueeze(1)
        if chain is not None and dead is not None:
            chain.masked_fill_(dead, 0.0)  # of a row that holds NaN it would be NaN, and so its gradient of 0
        label_logit = total = None
        labels = None if labels is None or terms.ce_weight == 0.0 else labels.unsqueeze(1)
        if labels is not None:
            labels = labels if dead is None else labels.masked_fill(dead, 0)
            labels, outside = _inside(labels, logits.shape[1])
            label_logit = _alive(logits.gather(1, labels).to(wide_dtype(logits.dtype)), dead)
            label_logit = label_logit.masked_fill(outside, math.nan)
            if terms.label_smoothing != 0.0:
                total = _alive(logits.sum(1, keepdim=True, dtype=torch.float64), dead).squeeze(1)
        return _Rows(backend, logits, terms, labels, label_logit, total, chain, dead, row_weight)

    def cross_entropy(self, zero: Tensor, log_sum: Tensor) -> Tensor:
        """(R,) from the log-sum-exp at temperature 1, measured from `zero`."""
        if self.label_logit is None:
            return torch.zeros_like(log_sum)
        smoothing = self.terms.label_smoothing
        value = log_sum + (1.0 - smoothing) * (zero - self.label_logit.squeeze(1))
        if self.total is not None:
            value = value + smoothing * (zero - self.total / self.logits.shape[1]).to(value.dtype)
        return value if self.dead is None else value.masked_fill(self.dead.squeeze(1), 0.0)

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(R,) of the divergence, of the cross entropy's softmax, and the constant of its smoothing."""
        terms = self.terms
        unit = self.row_weight
        if unit is None:
            unit = torch.ones(
                self.logits.shape[0], dtype=wide_dtype(self.logits.dtype), device=self.logits.device
            )
        scaled = unit.to(wide_dtype(self.logits.dtype)) * terms.student_transform.scale
        if self.labels is None:
            return scaled * terms.kd_scale, None, None
        of_ce = scaled * terms.ce_weight
        smoothing = terms.label_smoothing
        constant = None if smoothing == 0.0 else of_ce * (-smoothing / self.logits.shape[1])
        return scaled * terms.kd_scale, of_ce, constant

    def label_entry(
        self, of_kd: Tensor | None, zero: Tensor, log_sum: Tensor, of_ce: Tensor, constant: Tensor | None
    ) -> Tensor:
        """(R, 1) the gradient at the label: the part of the divergence, and softmax minus target of the cross entropy.

        `log_sum` is of all logits at temperature 1, relative to `zero`; `of_ce` and `constant` are those of `factors`.
        """
        assert self.label_logit is not None
        entry = _softmax_entries(self.label_logit - zero.unsqueeze(1), log_sum, of_ce)
        entry = entry if of_kd is None else of_kd + entry
        entry = entry - ((1.0 - self.terms.label_smoothing) * of_ce).unsqueeze(1)
        return entry if constant is None else entry + constant.unsqueeze(1)

    def finish(self, grad: Tensor, entries: Tensor | None, rounded: Tensor | None) -> None:
        """Put the label's entry (R, 1) into the gradient, go back through the softcap, and round it where that is due."""
        if entries is not None and self.labels is not None:
            grad.scatter_(1, self.labels, entries.to(grad.dtype))
        if self.chain is not None:
            grad.mul_(self.chain)
        if rounded is not None and rounded is not grad:
            rounded.copy_(grad)


def _inside(ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids with 0 for those out of range, and which these are: they are not read, and become a NaN of their row.

    On a device, and in a compiled graph, nobody has looked at them: the host would wait for the device.
    """
    outside = (ids < 0) | (ids >= vocabulary)
    return ids.masked_fill(outside, 0), outside


def _alive(tensor: Tensor, dead: Tensor | None) -> Tensor:
    return tensor if dead is None else tensor.masked_fill(dead, 0.0)


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
    grad: Tensor | None = None,  # (R, V), may lie over the logits
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,), and into `grad` their weighted gradient, as `Backend.kd_rows`."""
    rounded = grad
    logits, grad = _upcast(logits, bias, terms.student_transform, grad)
    rows = _Rows.make(backend, logits, terms, labels, bias, row_weight, grad is not None)
    wide = wide_dtype(logits.dtype)
    indices, outside = _inside(indices, logits.shape[1])
    logprobs = logprobs.masked_fill(outside, math.nan)
    kept = logprobs > -math.inf
    raw = logits.gather(1, indices)
    logits.scatter_(1, indices, raw.masked_fill(kept, -math.inf))
    student = _alive(raw.to(wide), rows.dead).masked_fill(~kept, -math.inf)
    teacher = _alive(logprobs.double(), rows.dead)

    # Tempered before the others are put together, or after: that is the difference of the two tails.
    bucket = tail == "bucket"
    temperature = 1.0 if bucket else terms.temperature
    statistics = backend.row_statistics(
        logits, temperature=temperature, at_one=rows.labels is not None, row_weight=row_weight
    )
    # All logits are measured from the largest of the row, kept or not.
    zero = torch.maximum(student.amax(1), statistics[0])
    zero = torch.where(statistics[1] == -math.inf, student.amax(1), zero)
    student = student - zero.unsqueeze(1)
    move = (statistics[0] - zero).masked_fill(statistics[1] == -math.inf, 0.0)
    others = statistics[1] + move / temperature
    kd, of_kept, of_others = _categories(student, others, teacher, bucket, logits.shape[1], terms)
    log_sum = torch.logaddexp(statistics[2] + move, student.logsumexp(1))
    ce = rows.cross_entropy(zero, log_sum)
    if rows.dead is not None:  # the derivative, too: it may be infinite, which a factor of 0 would not stop
        gone = rows.dead.squeeze(1)
        kd, of_others = kd.masked_fill(gone, 0.0), of_others.masked_fill(gone, 0.0)
        of_kept = of_kept.masked_fill(rows.dead, 0.0)
    if grad is None:
        return kd.to(wide), ce

    of_kd, of_ce, constant = rows.factors()
    nothing = others == -math.inf
    factor = (of_kd * of_others).masked_fill(nothing, 0.0)
    statistics[1].masked_fill_(nothing, 0.0)
    statistics[2] = log_sum - move
    backend.softmax_gradient(logits, statistics, factor, of_ce, constant, temperature=temperature, grad=grad)

    entries = of_kd.unsqueeze(1) * of_kept
    if of_ce is not None:
        entries = entries + _softmax_entries(student, log_sum, of_ce)
    if constant is not None:
        entries = entries + constant.unsqueeze(1)
    # An entry that was not kept belongs to the others, which are written already.
    entries = torch.where(kept, entries.to(grad.dtype), grad.gather(1, indices))
    own = None
    if rows.labels is not None and rows.label_logit is not None and of_ce is not None:
        among = (indices == rows.labels) & kept
        own = _softmax_entries((rows.label_logit - zero.unsqueeze(1)) / temperature, others, factor)
        kept_own = (of_kd.unsqueeze(1) * of_kept).masked_fill(~among, 0.0).sum(1, keepdim=True)
        own = torch.where(among.any(1, keepdim=True), kept_own, own)
        own = rows.label_entry(own, zero, log_sum, of_ce, constant)
    grad.scatter_(1, indices, entries)
    rows.finish(grad, own, rounded)
    return kd.to(wide), ce


def _categories(
    student: Tensor,  # (R, K) kept logits
    others: Tensor,  # (R,) log-sum-exp of the others
    teacher: Tensor,  # (R, K) log-probabilities in float64
    bucket: bool,
    vocabulary: int,
    terms: RowTerms,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of the K + 1 categories (R,), and its derivatives for the kept logits and for `others`."""
    if bucket:
        rest = (1.0 - teacher.exp().sum(1, keepdim=True)).clamp_min(LEAST_REST).log()
        # Where every id was kept, what is left is the rounding of the log-probabilities.
        every = (teacher > -math.inf).sum(1, keepdim=True) == vocabulary
        rest = rest.masked_fill(every, -math.inf)
        log_p_t = (torch.cat((teacher, rest), 1) / terms.temperature).log_softmax(1)
    else:
        log_p_t = (teacher / terms.temperature).log_softmax(1)
        log_p_t = torch.cat((log_p_t, torch.full_like(log_p_t[:, :1], -math.inf)), 1)
    # The others' log-sum-exp is tempered already where tempering came first.
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
    grad: Tensor | None = None,  # (R, V), may lie over the logits; without the part of the cross-term
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,); into `grad` what of their gradient goes through the logits' own softmax."""
    rounded = grad
    logits, grad = _upcast(logits, bias, terms.student_transform, grad)
    rows = _Rows.make(backend, logits, terms, labels, bias, row_weight, grad is not None)
    temperature = terms.temperature
    statistics = backend.row_statistics(
        logits, temperature=temperature, at_one=rows.labels is not None, row_weight=row_weight
    )
    zero = statistics[0]
    # In float64: these are as large as logits are, and what is left of them is not.
    mean = mean.double() * terms.student_transform.scale
    kd = statistics[1].double() + (zero.double() - mean) / temperature - entropy.double()
    kd = kd if rows.dead is None else kd.masked_fill(rows.dead.squeeze(1), 0.0)
    ce = rows.cross_entropy(zero, statistics[2])
    if grad is not None:
        of_kd, of_ce, constant = rows.factors()
        factor, own = of_kd / temperature, None
        backend.softmax_gradient(
            logits, statistics, factor, of_ce, constant, temperature=temperature, grad=grad
        )
        if rows.label_logit is not None and of_ce is not None:
            label = (rows.label_logit - zero.unsqueeze(1)) / temperature
            own = _softmax_entries(label, statistics[1], factor)
            own = rows.label_entry(own, zero, statistics[2], of_ce, constant)
        rows.finish(grad, own, rounded)
    return kd.to(wide_dtype(logits.dtype)), ce


def label_rows(
    backend: Backend,
    logits: Tensor,  # (R, V) of the student before bias and transform, overwritten where there is one of them
    labels: Tensor | None,  # (R,)
    terms: RowTerms,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,  # (R, V), may lie over the logits
) -> tuple[Tensor, Tensor]:
    """0 and cross entropy (R,), and into `grad` its weighted gradient, as `Backend.kd_rows` for a divergence of weight 0."""
    wide = wide_dtype(logits.dtype)
    nothing = logits.new_zeros(logits.shape[0], dtype=wide)
    if labels is None or terms.ce_weight == 0.0:
        if grad is not None:
            grad.zero_()
        return nothing, nothing
    rounded = grad
    logits, grad = _upcast(logits, bias, terms.student_transform, grad)
    rows = _Rows.make(backend, logits, terms, labels, bias, row_weight, grad is not None)
    statistics = backend.row_statistics(logits, temperature=1.0, at_one=True, row_weight=row_weight)
    zero, log_sum = statistics[0], statistics[2]
    ce = rows.cross_entropy(zero, log_sum)
    _, of_ce, constant = rows.factors()
    if grad is not None and rows.label_logit is not None and of_ce is not None:
        backend.softmax_gradient(logits, statistics, of_ce, None, constant, temperature=1.0, grad=grad)
        rows.finish(grad, rows.label_entry(None, zero, log_sum, of_ce, constant), rounded)
    return nothing, ce
