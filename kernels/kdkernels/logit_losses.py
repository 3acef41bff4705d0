"""`kd_loss` and `linear_kd_loss`: check, choose the back end, hand over."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from . import checks
from .autograd import reduce_rows, row_loss_and_rest
from .backends import load_backend
from .chunked import LinearKD, LogitKD
from .compiling import traceable
from .divergences import Divergence
from .finite import refuse_bad_rows
from .logit_checks import check_logit_dtype
from .low_memory import LowMemoryKD
from .options import IGNORE_INDEX, Impl, LinearLossOptions, LossOptions, Mode, Reduction, RowTerms
from .prepare import autocast_dtype, autocast_off, check_options, flat, prepare
from .reference import linear, wide
from .reference_rows import cast_to, reference_rows
from .sharded import ShardedKD, shard_of
from .stats import KDStats, stats_from_rows
from .teacher_checks import check_cross_term_head
from .teachers import Teacher, TeacherCrossTerm

# Logits of at most this many elements keep their gradient from the forward pass of `kd_loss` everywhere: 256 KiB in float32.
SMALL_LOGITS = 1 << 16


def _gradient_with_value(logits: Tensor) -> bool:
    """True where `kd_loss` takes the gradient along in the forward pass instead of starting again in backward.

    On a CPU that saves the exponentials of half the work and costs no memory at the peak, which is when both exist. On
    a GPU scaling a finished gradient moves as many bytes as it saves, and in half precision it would round twice; but
    of a few classes the calls cost more than the bytes.
    """
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return True
    return logits.numel() <= SMALL_LOGITS and logits.dtype != torch.float16


def _half_bound(terms: RowTerms, dtype: torch.dtype) -> float | None:
    """The usual size of one logit's gradient where it is kept in float16, see `autograd.Solver`."""
    return (
        max(abs(terms.kd_scale) / terms.temperature, abs(terms.ce_weight)) if dtype == torch.float16 else None
    )


def _finish(
    loss: Tensor, statistics: Tensor | None, leading: torch.Size, reduction: Reduction
) -> Tensor | tuple[Tensor, KDStats]:
    """The loss in its shape, with the statistics where they were asked for."""
    loss = loss.reshape(leading) if reduction == "none" else loss
    return loss if statistics is None else (loss, stats_from_rows(statistics, leading))


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
        student_logits: (..., V_s), float16, bfloat16, float32 or float64.
        teacher: logits (..., V_t) as a tensor or TeacherLogits, TeacherHead(hidden, weight, bias) or
            TeacherTopK(logprobs, indices). Frozen; its dtype may differ from the student's. Logits may be -inf where the
            teacher gives probability 0.
        labels: (...) int64 class ids; needed for ce_weight != 0 and for Decoupled. Without labels every row counts. On a
            GPU labels out of range are not looked for, as that would make the host wait for the device.
        divergence: "forward_kl" (default), "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", or an object:
            ForwardKL(), ReverseKL(), JSD(beta), SkewKL(alpha), SkewReverseKL(alpha), TVD(), AlphaBeta(alpha, beta),
            Decoupled(target, non_target).
        temperature: plain number above 0; both distributions of the divergence are taken at it. Default 1.0.
        kd_weight, ce_weight: plain numbers before the divergence and before the cross entropy. Defaults 1.0
            and 0.0. The cross entropy is of the student at temperature 1, over its whole vocabulary. With kd_weight 0 the
            teacher is not read, whatever it holds, unless return_stats asks for numbers of it.
        label_smoothing: in [0, 1): that share of the label's weight is spread over the student's whole vocabulary, as
            in F.cross_entropy. Default 0.0.
        t_squared: multiply the divergence, value and gradient, by temperature squared. Default True.
        ignore_index: rows with this label do not count, whatever else they hold. Default -100.
        token_weight: (...) floating, one factor per row, without gradient. Default: 1 for each row.
        reduction: "mean" (default) divides the sum by the number of counted rows, by the sum of their
            `token_weight` when given, or by `num_items_in_batch`; "sum"; "none" gives shape (...), 0 in rows
            that do not count.
        num_items_in_batch: a number or a 0-D tensor, which stays on its device. For gradient accumulation:
            the counted rows of all micro-batches together.
        softcap, logit_scale: of the student: its logits are softcap * tanh(logit_scale * student_logits / softcap), or
            logit_scale * student_logits with softcap=None. Defaults None and 1.0. The teacher's are in TeacherHead.
        vocab_map: for V_s != V_t. "shared_prefix": ids below min(V_s, V_t) are the same tokens. Or an int64 tensor
            (V_s,): the teacher's id of each student id, -1 where it has none. Both softmaxes of the divergence run
            over the shared ids, and its gradient is 0 elsewhere; the cross entropy is over all of the student's.
        impl: None (default) takes triton for CUDA and ROCm tensors and torch elsewhere; "triton", "torch" and
            "reference" (eager float32) are taken as asked, never replaced.
        return_stats: also return `KDStats`, numbers per token. Default False.
        check_finite: raise FloatingPointError when the loss is NaN or infinite, naming the first bad row and side; the
            host waits for the device. Default False.

    Returns:
        float32 (float64 for float64 inputs): 0-D, or (...) for reduction="none". Without a counted row a
        finite 0 that still has a graph. With return_stats=True (loss, KDStats).

    The gradient has the dtype of `student_logits` and is computed in float32 (float64 for float64): together with the
    value for few logits and for float32 and float64 on a CPU, else in backward. The loss has no second derivative
    (impl="reference" does).

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit; a teacher that requires grad.
        NotImplementedError: an option that this back end does not support yet.
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
                *problem.form,
                shared=problem.vocab_map if isinstance(problem.vocab_map, int) else None,
                stats=return_stats,
            )
            tensors = (logits, *problem.teacher_tensors, *problem.row_tensors)
            loss, statistics = row_loss_and_rest(
                solver,
                tensors,
                counted.weight,
                counted.denominator,
                reduction,
                gradient_in_forward=_gradient_with_value(logits),
            )
        if check_finite:
            refuse_bad_rows(problem, loss, logits, None, None)
    return _finish(loss, statistics, student_logits.shape[:-1], reduction)


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[LinearLossOptions],
) -> tuple[Tensor, KDStats]: ...
@traceable
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
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
    static_shapes: bool = False,
    mode: Mode = "fast",
    chunk_bytes: int | None = None,
    vocab_group: object | None = None,
    logit_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, KDStats]:
    """`kd_loss` straight from hidden states and heads: the (N, V) logits never exist as a whole.

    Replaces:

        student_logits = F.linear(student_hidden, student_weight, student_bias)
        teacher_logits = F.linear(teacher.hidden, teacher.weight, teacher.bias)
        loss = kd_loss(student_logits, teacher_logits, labels, ...)

    Args, where they are not those of `kd_loss`:
        student_hidden: (..., D_s), float16, bfloat16, float32 or float64: what enters the student's head.
        student_weight: (V_s, D_s), the student's head; no work is spent on its gradient when it is frozen.
        teacher: TeacherHead(hidden (..., D_t), weight (V_t, D_t), bias (V_t,)), any form of `kd_loss`, or
            TeacherCrossTerm where the student's head is frozen. Frozen; D_t and the dtype may differ from the student's.
        labels: as `kd_loss`; on a GPU, too, labels out of range are refused, except with static_shapes.
        student_bias: (V_s,), the bias of the student's head. Scale and softcap come after it.
        kd_weight: with 0 (and without return_stats) the teacher is not read and its logits are not made: plain training
            with chunked logits. Only a vocab_group still reads it.
        static_shapes: keep rows that do not count in the products instead of gathering the others first.
            Reading their number is the only time the host waits for the device. Default False.
        mode: "fast" (default) holds the logits of some tokens over the whole vocabulary and multiplies four times;
            "low_memory" holds a tile of the vocabulary at a time and makes its logits twice or three times. It takes
            teachers with all their logits, and neither an index map nor return_stats.
        chunk_bytes: size of the two float32 buffers of logits together, which sets how many tokens, and in low-memory
            mode how many columns, are worked on at a time. Default: chosen by the back end; 64 MiB for low memory.
        vocab_group: a process group of torch.distributed whose ranks hold the vocabulary's slices in the order of
            their numbers: student_weight, student_bias and the teacher's weight and bias (or logits) are this rank's,
            hidden states, labels and everything else are the same on all ranks. Each rank gets the loss of the whole
            vocabulary, the whole gradient of the hidden states, and that of its own slice. Default None: no sharding.
        logit_dtype: None (default) keeps logits in float32. torch.bfloat16, for bfloat16 heads, rounds them: half the memory
            and traffic, and a gradient that is wrong by 30 % where the student is 0.01 nats from its teacher.

    Returns:
        float32 (float64 for float64 inputs): 0-D, or (...) for reduction="none". Without a counted row a
        finite 0 that still has a graph. With return_stats=True (loss, KDStats).

    Logits are float32 out of the product for every input dtype. Gradients have the dtypes of their inputs; for
    "mean" and "sum" they are computed together with the value. The loss has no second derivative
    (impl="reference" does). Under autocast hidden states and weights are cast as F.linear casts them.

    Raises:
        As `kd_loss`.

    Source: as `kd_loss`; the gradient during the forward pass over token chunks is that of Liger-Kernel
    (Hsu et al., 2024).
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
        static_shapes=static_shapes,
        mode=mode,
        chunk_bytes=chunk_bytes,
        vocab_group=vocab_group,
        logit_dtype=logit_dtype,
    )
    cast = autocast_dtype(student_hidden) if isinstance(student_hidden, Tensor) else None
    student_hidden, student_weight, student_bias = checks.check_head(
        "student",
        student_hidden,
        student_weight,
        student_bias,
        hidden_name="student_hidden",
        weight_name="student_weight",
        bias_name="student_bias",
        same_dtype=cast is None,
    )
    vocabulary = student_weight.shape[0]
    shard = None if vocab_group is None else shard_of(vocab_group, vocabulary, student_weight.device)
    problem = prepare(
        "student_hidden",
        student_hidden,
        vocabulary,
        student_weight.dtype,
        teacher,
        labels,
        terms,
        token_weight=token_weight,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        vocab_map=vocab_map,
        impl=impl,
        return_stats=return_stats,
        mode=mode,
        sharded_vocabulary=None if shard is None else shard.total,
    )
    check_cross_term_head(problem.teacher, problem.terms, student_weight, student_bias)
    if logit_dtype is not None:
        check_logit_dtype(
            logit_dtype, cast or student_weight.dtype, problem.teacher, cast, problem.impl, mode, vocab_group
        )
    hidden, counted = flat(student_hidden), problem.counted
    with autocast_off(hidden):
        if problem.impl == "reference":
            kept = hidden
            if counted.weight is not None:
                kept = hidden.masked_fill((counted.weight == 0).unsqueeze(1), 0.0)
            student = linear(cast_to(kept, cast), cast_to(student_weight, cast), student_bias)
            values, statistics = reference_rows(problem, kept, student)
            loss = reduce_rows(values, counted.weight, counted.denominator, reduction)
        else:
            shared = problem.vocab_map if isinstance(problem.vocab_map, int) else None
            half_bound = _half_bound(problem.terms, cast or student_weight.dtype)
            compact = not static_shapes and counted.weight is not None
            backend = load_backend(problem.impl)
            if shard is not None:
                solver = ShardedKD(problem.terms, backend, chunk_bytes, cast, half_bound, shard, compact)
            elif mode == "low_memory":
                solver = LowMemoryKD(
                    problem.terms, backend, chunk_bytes, cast, half_bound, shared=shared, compact=compact
                )
            else:
                solver = LinearKD(
                    problem.terms,
                    backend,
                    chunk_bytes,
                    cast,
                    half_bound,
                    *problem.form,
                    shared=shared,
                    stats=return_stats,
                    compact=compact,
                    logit_dtype=logit_dtype,
                )
            tensors = (
                hidden, student_weight, student_bias, *problem.teacher_tensors, *problem.row_tensors
            )  # fmt: skip
            loss, statistics = row_loss_and_rest(
                solver, tensors, counted.weight, counted.denominator, reduction, gradient_in_forward=True
            )
        if check_finite:
            refuse_bad_rows(problem, loss, hidden, student_weight, student_bias)
    return _finish(loss, statistics, student_hidden.shape[:-1], reduction)
