"""`kd_loss`: check, choose the back end, hand over."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import reduce_rows
from ..core.backend import load_backend
from ..core.dispatch import row_loss_and_aux, traceable
from ..core.matmul import autocast_off
from ..core.rows import flat
from ..divergences import Divergence
from ..options import IGNORE_INDEX, Impl, LossOptions, Reduction
from ..reference.logits import wide
from ..stats import KDStats, in_shape
from ..teachers import Teacher, TeacherCrossTerm
from .by_rows import LogitKD
from .diagnose import refuse_bad_rows
from .few_rows import SMALL_LOGITS, few_rows_loss
from .problem import check_options, prepare
from .reference_rows import reference_rows


def _gradient_with_value(logits: Tensor) -> bool:
    """True where `kd_loss` takes the gradient along in the forward pass instead of starting again in backward.

    On a CPU that saves the exponentials of half the work and costs no memory at the peak, which is when both exist. On
    a GPU values keep what the gradient needs of a row, and scaling a finished gradient would move as many bytes; but of
    a few classes the calls cost more than the bytes. A gradient in half precision would be rounded twice.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        return False
    return logits.device.type == "cpu" or logits.numel() <= SMALL_LOGITS


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, KDStats]: ...
@traceable
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    t_squared: bool = True,
    ignore_index: int = IGNORE_INDEX,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_map: str | Tensor | None = None,
    impl: Impl | None = None,
    return_stats: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, KDStats]:
    """Knowledge-distillation loss of student logits, with an optional cross entropy on labels.

    Replaces, without keeping any (N, V) tensor but the logits and their gradient:

        log_p_s = F.log_softmax(student_logits / T, -1)
        log_p_t = F.log_softmax(teacher_logits / T, -1)
        loss = kd_weight * T**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
        loss = loss + ce_weight * F.cross_entropy(student_logits, labels)

    Args:
        student_logits: (..., V_s), float16, bfloat16, float32 or float64. Rows one stride apart are read where they are;
            others, such as logits[:, :-1] of several samples, are copied first. To shift by one token, shift the labels
            instead, with ignore_index in the last position.
        teacher: logits (..., V_t) as a tensor or TeacherLogits, TeacherHead(hidden, weight, bias) or
            TeacherTopK(logprobs, indices). Frozen; its dtype may differ from the student's. Logits may be -inf where the
            teacher gives probability 0.
        labels: (...) int64 class ids; needed for ce_weight != 0 and for Decoupled. Without labels every row is valid. On a
            GPU labels out of range are not looked for, as that would be a host sync.
        divergence: "forward_kl" (default), "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "chi_squared", or an
            object: ForwardKL(), ReverseKL(), JSD(beta), SkewKL(alpha), SkewReverseKL(alpha), TVD(),
            AlphaBeta(alpha, beta), ChiSquared(), Renyi(alpha), Decoupled(target, non_target).
        temperature: plain number in [1e-6, 100]; both distributions of the divergence are taken at it. Default 1.0.
        kd_weight: plain number, the factor of the divergence. With 0 the teacher is not read, whatever it holds, unless
            return_stats asks for numbers of it. Default 1.0.
        ce_weight: plain number, the factor of the student's cross entropy at temperature 1 over its whole vocabulary.
            Default 0.0.
        label_smoothing: in [0, 1): the share of the label's weight that all entries of the student's vocabulary get in
            equal parts, as in F.cross_entropy. Default 0.0.
        t_squared: multiply the divergence, value and gradient, by temperature squared. Default True.
        ignore_index: rows with this label are ignored, whatever they hold. Default -100.
        token_weight: (...) floating, one factor per row, without gradient; rows of weight 0 are ignored. Default: 1 for
            each row.
        reduction: "mean" (default) divides the sum by the number of valid rows, by the sum of their `token_weight` when
            it is passed, or by `num_items_in_batch`; "sum"; "none" returns shape (...), 0 in ignored rows.
        num_items_in_batch: a number or a 0-D tensor, which stays on its device. For gradient accumulation:
            the valid rows of all micro-batches together.
        softcap: the student's logits are softcap * tanh(logit_scale * student_logits / softcap); those of the teacher
            are in TeacherHead. Default None: no softcap.
        logit_scale: plain number other than 0 that multiplies the student's logits, before a softcap. Default 1.0.
        vocab_map: for V_s != V_t. "shared_prefix": ids below min(V_s, V_t) are the same tokens. Or an int64 tensor
            (V_s,): the teacher's id of each student id, -1 where it has none. Both softmaxes of the divergence run
            over the shared ids, and its gradient is 0 elsewhere; the cross entropy is over all of the student's.
        impl: None (default) takes triton for CUDA and ROCm tensors and torch elsewhere; "triton", "torch" and
            "reference" (eager float32) are taken as asked, never replaced.
        return_stats: also return `KDStats`, numbers per token. Default False.
        check_finite: raise FloatingPointError when the loss is NaN or infinite, naming the first bad row and side; the
            host sync. Only the loss is looked at: with a finite loss the gradient of float16 logits may
            overflow beyond 65,504, which torch.amp.GradScaler finds. Default False.

    Returns:
        Tensor: the loss in float32 (float64 for float64 inputs): 0-D, or (...) for reduction="none". Without a valid row a
            finite 0 that still has a graph. With return_stats=True a tuple of the loss and `KDStats`.

    The gradient has the dtype of `student_logits` and is computed in float32 (float64 for float64): together with the
    value for few logits and for float32 and float64 on a CPU, else in backward. The loss has no second derivative
    (impl="reference" does).

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit; a teacher that requires grad.
        NotImplementedError: a combination of options that is not supported.
        FloatingPointError: see check_finite.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, section 2 (T squared);
    Lin, "Divergence measures based on the Shannon entropy", 1991 (JSD with weights). The other divergences name
    theirs.
    """
    terms = check_options(
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        t_squared=t_squared,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_map=vocab_map,
        impl=impl,
        return_stats=return_stats,
        check_finite=check_finite,
    )
    student_logits = checks.check_student_logits(student_logits)
    vocabulary = student_logits.shape[-1]
    if isinstance(teacher, TeacherCrossTerm):
        raise ValueError(
            "TeacherCrossTerm is a product with the student's head, which kd_loss does not see; use linear_kd_loss"
        )
    plain = token_weight is None and vocab_map is None and not return_stats and not check_finite
    if plain and (impl is None or impl == "torch"):
        loss = few_rows_loss(
            student_logits, teacher, labels, terms, ignore_index, reduction, num_items_in_batch
        )
        if loss is not None:
            return loss
    problem = prepare(
        "student_logits",
        student_logits,
        vocabulary,
        student_logits.dtype,
        teacher,
        labels,
        terms,
        token_weight=token_weight,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        vocab_map=vocab_map,
        impl=impl,
        return_stats=return_stats,
    )
    logits, counted = flat(student_logits), problem.counted
    with autocast_off(logits):
        if problem.impl == "reference":
            values, statistics = reference_rows(problem, None, wide(logits))
            loss = reduce_rows(values, counted.weight, counted.denominator, reduction)
        else:
            solver = LogitKD(
                problem.terms,
                load_backend(problem.impl),
                problem.autocast,
                None,
                problem.given.layout,
                return_stats,
            )
            loss, statistics = row_loss_and_aux(
                solver,
                (logits, *problem.given.tensors),
                counted.weight,
                counted.denominator,
                reduction,
                gradient_in_forward=_gradient_with_value(logits),
            )
        if check_finite:
            refuse_bad_rows(problem, loss, logits, None, None)
    return in_shape(loss, statistics, student_logits.shape[:-1], reduction)
