"""`linear_kd_loss`: check, choose the back end and the schedule, hand over."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import reduce_rows
from ..core.backend import load_backend, resolve_impl
from ..core.dispatch import row_loss_and_aux, traceable
from ..core.matmul import autocast_dtype, autocast_off
from ..core.rows import flat, zero_masked_rows
from ..divergences import Divergence
from ..options import IGNORE_INDEX, Impl, LinearLossOptions, Mode, Reduction, RowTerms
from ..reference.logits import linear
from ..stats import KDStats, in_shape
from ..teachers import Teacher
from .by_rows import LinearKD
from .by_vocabulary import MIN_TILE, TiledKD
from .diagnose import refuse_bad_rows
from .option_checks import check_logit_dtype
from .problem import check_options, prepare
from .reference_rows import cast_to, reference_rows
from .sharded import shard_of
from .teacher_checks import check_cross_term_head


def _fp16_bound(terms: RowTerms, dtype: torch.dtype) -> float | None:
    """The usual size of one logit's gradient where it is kept in float16, see `autograd.Solver`."""
    return (
        max(abs(terms.kd_scale) / terms.temperature, abs(terms.ce_weight)) if dtype == torch.float16 else None
    )


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

    Args:
        student_hidden: (..., D_s), float16, bfloat16, float32 or float64: the input of the student's head.
        student_weight: (V_s, D_s), the student's head; no work is spent on its gradient when it is frozen.
        teacher: TeacherHead(hidden (..., D_t), weight (V_t, D_t), bias (V_t,)), logits (..., V_t) as a tensor or
            TeacherLogits, TeacherTopK(logprobs, indices), or TeacherCrossTerm where the student's head is frozen.
            Frozen; D_t and the dtype may differ from the student's.
        labels: (...) int64 class ids; needed for ce_weight != 0 and for Decoupled. Without labels every row is valid.
            Labels out of range are refused, on a GPU except with static_shapes.
        student_bias: (V_s,), the bias of the student's head. Scale and softcap come after it.
        divergence: "forward_kl" (default), "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "chi_squared", or an
            object: ForwardKL(), ReverseKL(), JSD(beta), SkewKL(alpha), SkewReverseKL(alpha), TVD(),
            AlphaBeta(alpha, beta), ChiSquared(), Renyi(alpha), Decoupled(target, non_target).
        temperature: plain number in [1e-6, 100], of both distributions of the divergence. Default 1.0.
        kd_weight: plain number, the factor of the divergence. With 0 (and without return_stats) the teacher is not read
            and its logits are not computed: plain training with chunked logits. Default 1.0.
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
        softcap: the student's logits are softcap * tanh(logit_scale * z / softcap) for an output z of its head; those of
            the teacher are in TeacherHead. Default None: no softcap.
        logit_scale: plain number other than 0 that multiplies the output of the student's head, before a softcap.
            Default 1.0.
        vocab_map: for V_s != V_t. "shared_prefix": ids below min(V_s, V_t) are the same tokens. Or an int64 tensor
            (V_s,): the teacher's id of each student id, -1 where it has none. Both softmaxes of the divergence run
            over the shared ids, and its gradient is 0 elsewhere; the cross entropy is over all of the student's.
        impl: None (default) takes triton for CUDA and ROCm tensors and torch elsewhere; "triton", "torch" and
            "reference" (eager float32, whole logits) are taken as asked, never replaced.
        return_stats: also return `KDStats`, numbers per token. Default False.
        check_finite: raise FloatingPointError when the loss is NaN or infinite, naming the first bad row and side; a
            host sync. Default False.
        static_shapes: keep ignored rows in the GEMMs instead of gathering the valid ones first. Reading the number of
            valid rows is the only host sync. Default False.
        mode: "fast" (default) holds the logits of some tokens over the whole vocabulary and runs four GEMMs;
            "low_memory" holds a tile of the vocabulary at a time and computes its logits twice or three times. It takes
            teachers with all their logits, and neither an index map nor return_stats.
        chunk_bytes: size of the two float32 buffers of logits together, which sets how many tokens, and in low-memory
            mode how many columns, are worked on at a time; at least one row (128 of its columns in low-memory mode).
            Default: chosen by the back end; for low memory 64 MiB, on GPUs 512 MiB.
        vocab_group: a process group of torch.distributed whose ranks hold the shards of the vocabulary in the order of
            their ranks: student_weight, student_bias and the teacher's weight and bias (or logits) are this rank's,
            hidden states, labels and everything else are the same on all ranks. Each rank gets the loss of the whole
            vocabulary, the whole gradient of the hidden states, and that of its own shard. The ranks exchange the
            sizes of their shards in every call, which is one host sync. Default None: no sharding.
        logit_dtype: None (default) keeps logits in float32. torch.bfloat16, for bfloat16 heads, rounds them: half the
            memory and traffic, and a gradient that is wrong by 30 % where the student is 0.01 nats from its teacher.

    Returns:
        Tensor: the loss in float32 (float64 for float64 inputs): 0-D, or (...) for reduction="none". Without a valid row a
            finite 0 that still has a graph. With return_stats=True a tuple of the loss and `KDStats`.

    Logits leave their GEMM in float32 for every input dtype; float32 heads are multiplied in float32 also where TF32 is
    allowed. Gradients have the dtypes of their inputs; for "mean" and "sum" they are computed together with the value.
    The loss has no second derivative (impl="reference" does). Under autocast hidden states and weights are cast as F.linear casts them.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit; a teacher that requires grad.
        NotImplementedError: a combination of options that is not supported.
        FloatingPointError: see check_finite.

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
    cast = autocast_dtype(checks.check_tensor("student_hidden", student_hidden))
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
    shard = None
    if vocab_group is not None:
        backend = load_backend(resolve_impl(impl, student_weight.device, student_weight.dtype))
        rows = student_hidden.numel() // max(student_hidden.shape[-1], 1)
        chunk_rows = backend.chunk_rows(max(rows, 1), vocabulary, chunk_bytes, student_weight.device)
        shard = shard_of(vocab_group, rows, vocabulary, chunk_rows, student_weight.device)
    else:
        checks.check_chunk_holds(
            chunk_bytes, min(vocabulary, MIN_TILE) if mode == "low_memory" else vocabulary
        )
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
            kept = zero_masked_rows(hidden, counted.weight)
            student = linear(cast_to(kept, cast), cast_to(student_weight, cast), student_bias)
            values, statistics = reference_rows(problem, kept, student)
            loss = reduce_rows(values, counted.weight, counted.denominator, reduction)
        else:
            layout = problem.given.layout
            fp16_bound = _fp16_bound(problem.terms, cast or student_weight.dtype)
            compact = not static_shapes and counted.weight is not None
            backend = load_backend(problem.impl)
            if shard is not None or mode == "low_memory":
                solver = TiledKD(
                    problem.terms, backend, chunk_bytes, cast, fp16_bound, layout, compact, shard
                )
            else:
                solver = LinearKD(
                    problem.terms,
                    backend,
                    chunk_bytes,
                    cast,
                    fp16_bound,
                    layout,
                    return_stats,
                    compact,
                    logit_dtype,
                )
            tensors = (hidden, student_weight, student_bias, *problem.given.tensors)
            loss, statistics = row_loss_and_aux(
                solver, tensors, counted.weight, counted.denominator, reduction, gradient_in_forward=True
            )
        if check_finite:
            refuse_bad_rows(problem, loss, hidden, student_weight, student_bias)
    return in_shape(loss, statistics, student_hidden.shape[:-1], reduction)
