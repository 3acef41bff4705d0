"""What a row needs of its label: both logits, the cross entropy, and the divergence between label and rest."""

import triton
import triton.language as tl

from ..numeric import LN_2
from .divergence import kl_terms
from .row import transformed


@triton.jit
def _load_one(side, column, valid, other, HAS_BIAS: tl.constexpr, TRANSFORM: tl.constexpr):
    """One logit; `other` where the column is not valid, which is not read."""
    logit = tl.load(side.row_ptr + column, mask=valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        logit += tl.load(side.bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, transformed(logit, side, TRANSFORM), other)


@triton.jit
def student_label(row, label, valid, FLAGS: tl.constexpr):
    """The student's logit of the label; NaN for a label out of range, which a check would need a host sync to see."""
    return _load_one(
        row.student, label, valid, float("nan"), FLAGS.has_student_bias, tl.constexpr(FLAGS.student_transform)
    )


@triton.jit
def teacher_label(row, label, valid, FLAGS: tl.constexpr):
    """The teacher's logit of the label, -inf for one that it does not share; and whether it is shared."""
    place = label
    if FLAGS.vocab_map == "index":
        place = tl.load(row.map_ptr + label, mask=valid, other=-1).to(tl.int64)
        shared = valid & (place >= 0) & (place < row.V_teacher)
    else:
        shared = valid & (label < row.shared)
    logit = _load_one(
        row.teacher,
        place,
        shared,
        float("-inf"),
        FLAGS.has_teacher_bias,
        tl.constexpr(FLAGS.teacher_transform),
    )
    return logit, shared


@triton.jit
def cross_entropy(label_logit, reference, log_total, logit_sum, uniform, HAS_SMOOTHING: tl.constexpr):
    """-log p of the label at temperature 1, label smoothing included; log_total is in nats, from the reference."""
    value = log_total - (label_logit - reference)
    if HAS_SMOOTHING:
        # log sum exp - (1 - e) s_label - e mean(s), the mean measured from the label's logit (from 0 if that is -inf).
        value -= uniform * logit_sum
    return value


@triton.jit
def _softplus(x):
    """log2(1 + 2**x)."""
    return tl.maximum(x, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(x)))


@triton.jit
def label_divergence(student_label, student_log, teacher_label, teacher_log):
    """KL of the two-way distributions (label, rest), and p_s - p_t of the label.

    Labels and log-sums of the rest are log2 of unnormalised probabilities, each side from a reference of its own. The
    rest's probability comes from its own sum: 1 - p would lose a teacher that is nearly certain.
    """
    student = -_softplus(student_log - student_label)
    teacher = -_softplus(teacher_log - teacher_label)
    value, difference = kl_terms(tl.exp2(teacher), tl.exp2(student), (student - teacher) * LN_2)
    student_rest = -_softplus(student_label - student_log)
    teacher_rest = -_softplus(teacher_label - teacher_log)
    rest, _ = kl_terms(tl.exp2(teacher_rest), tl.exp2(student_rest), (student_rest - teacher_rest) * LN_2)
    return value + rest, difference


@triton.jit
def decoupled_parts(student_logit, teacher_logit, totals, target, non_target, scale):
    """Of a decoupled row: target * KL of the two-way distributions, target * (p_t - p_s) of the label, and the weight of
    the distributions without the label, 0 for a teacher that is certain of it. The logits are -inf where not shared."""
    value, difference = label_divergence(
        (student_logit - totals.student_reference) * scale,
        totals.student_log,
        (teacher_logit - totals.teacher_reference) * scale,
        totals.teacher_log,
    )
    rest = tl.where(totals.teacher_inverse == 0.0, 0.0, non_target)
    return target * value, -target * difference, rest
