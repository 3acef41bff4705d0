"""`kd_loss` and `linear_kd_loss`: check, choose the back end, hand over."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, get_args

import torch
from torch import Tensor

from . import checks, reference
from .autograd import reduce_rows, row_loss
from .backends import load_backend, resolve_impl
from .chunked import LinearKD, LogitKD
from .counting import Counted, compact_rows, count_rows
from .divergences import Divergence, resolve_divergence
from .matmul import wide_dtype
from .options import IGNORE_INDEX, Impl, Mode, Reduction, RowTerms
from .teachers import Teacher, TeacherHead, TeacherLogits

# Logits of at most this many elements keep their gradient from the forward pass of `kd_loss`: 256 KiB in float32.
SMALL_LOGITS = 1 << 16


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of the inputs of a linear layer on this tensor's device; None when it is off."""
    if not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """The loss chooses its dtypes itself; inside autocast the products would be rounded to half again."""
    return torch.autocast(tensor.device.type, enabled=False)


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
    static_shapes: bool = False,
    mode: Mode = "fast",
    chunk_bytes: int | None = None,
    vocab_group: object | None = None,
    logit_dtype: torch.dtype | None = None,
) -> RowTerms:
    """Check everything that needs no tensor; the terms of a row."""
    checks.check_temperature(temperature)
    checks.check_number("kd_weight", kd_weight)
    checks.check_number("ce_weight", ce_weight)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_flag("t_squared", t_squared)
    checks.check_flag("static_shapes", static_shapes)
    checks.check_choice("mode", mode, get_args(Mode))
    checks.check_impl(impl)
    checks.check_reduction(reduction, num_items_in_batch)
    checks.check_chunk_bytes(chunk_bytes)
    checks.refuse_unbuilt(
        label_smoothing=(label_smoothing, 0.0),
        softcap=(softcap, None),
        logit_scale=(logit_scale, 1.0),
        vocab_map=(vocab_map, None),
        return_stats=(return_stats, False),
        mode=(mode, "fast"),
        vocab_group=(vocab_group, None),
        logit_dtype=(logit_dtype, None),
    )
    return RowTerms(
        resolve_divergence(divergence), float(temperature), float(kd_weight), float(ce_weight), t_squared
    )


def _flat(tensor: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _teacher_tensors(teacher: TeacherLogits | TeacherHead) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Source (N, V) or (N, D_t), weight and bias."""
    if isinstance(teacher, TeacherLogits):
        return _flat(teacher.logits), None, None
    return _flat(teacher.hidden), teacher.weight, teacher.bias


def _half_bound(terms: RowTerms, dtype: torch.dtype) -> float | None:
    """The usual size of one logit's gradient where it is kept in float16, see `autograd.Solver`."""
    return (
        max(abs(terms.kd_scale) / terms.temperature, abs(terms.ce_weight)) if dtype == torch.float16 else None
    )


def _count(
    student: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    num_items_in_batch: int | Tensor | None,
) -> Counted:
    counted = None if labels is None else labels != ignore_index
    dtype = wide_dtype(student.dtype)
    return count_rows(student.shape[0], counted, token_weight, num_items_in_batch, student.device, dtype)


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
) -> Tensor:
    """Knowledge-distillation loss of student logits, with an optional cross entropy on labels.

    Replaces, without keeping any (N, V) tensor but the logits and their gradient:

        log_p_s = F.log_softmax(student_logits / T, -1)
        log_p_t = F.log_softmax(teacher_logits / T, -1)
        loss = kd_weight * T**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
        loss = loss + ce_weight * F.cross_entropy(student_logits, labels)

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64.
        teacher: logits (..., V) as a tensor or TeacherLogits, or TeacherHead(hidden, weight, bias). Frozen; its
            dtype may differ from the student's. Logits may be -inf where the teacher gives probability 0.
        labels: (...) int64 class ids; needed for ce_weight != 0. Without labels every row counts. On a GPU
            labels out of range are not looked for, as that would make the host wait for the device.
        divergence: "forward_kl" (default), "reverse_kl", "jsd", or an object: ForwardKL(), ReverseKL(), JSD(beta).
            The other divergences are not supported yet.
        temperature: plain number above 0; both distributions of the divergence are taken at it. Default 1.0.
        kd_weight, ce_weight: plain numbers before the divergence and before the cross entropy. Defaults 1.0
            and 0.0. The cross entropy is of the student at temperature 1.
        t_squared: multiply the divergence, value and gradient, by temperature squared. Default True.
        ignore_index: rows with this label do not count, whatever else they hold. Default -100.
        token_weight: (...) floating, one factor per row, without gradient. Default: 1 for each row.
        reduction: "mean" (default) divides the sum by the number of counted rows, by the sum of their
            `token_weight` when given, or by `num_items_in_batch`; "sum"; "none" gives shape (...), 0 in rows
            that do not count.
        num_items_in_batch: a number or a 0-D tensor, which stays on its device. For gradient accumulation:
            the counted rows of all micro-batches together.
        impl: None (default) takes triton for CUDA and ROCm tensors and torch elsewhere; "triton", "torch" and
            "reference" (eager float32) are taken as asked, never replaced.
        label_smoothing, softcap, logit_scale, vocab_map, return_stats: not supported yet.

    Returns:
        float32 (float64 for float64 inputs): 0-D, or (...) for reduction="none". Without a counted row a
        finite 0 that still has a graph.

    The gradient has the dtype of `student_logits` and is computed in backward, in float32. The loss has no
    second derivative (impl="reference" does).

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit; a teacher that requires grad.
        NotImplementedError: an option that is not supported yet.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, section 2 (T squared);
    Lin, "Divergence measures based on the Shannon entropy", 1991 (JSD with weights).
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
    )
    student_logits = checks.check_student_logits(student_logits)
    vocabulary = student_logits.shape[-1]
    cast = autocast_dtype(student_logits)
    teacher = checks.check_teacher(teacher, same_dtype=cast is None)
    checks.check_pair("student_logits", student_logits, vocabulary, teacher)
    checks.check_rows(
        "student_logits", student_logits, vocabulary, labels, token_weight, ce_weight, ignore_index
    )
    impl = resolve_impl(impl, student_logits.device, student_logits.dtype)

    leading = student_logits.shape[:-1]
    logits = _flat(student_logits)
    source, teacher_weight, teacher_bias = _teacher_tensors(teacher)
    labels = None if labels is None else labels.reshape(-1).long()
    token_weight = None if token_weight is None else token_weight.reshape(-1)
    with autocast_off(logits):
        counted = _count(logits, labels, ignore_index, token_weight, num_items_in_batch)
        if impl == "reference":
            values = reference.kd_row_losses(
                reference.wide(logits),
                _reference_teacher(source, teacher_weight, teacher_bias, cast),
                labels,
                counted.weight,
                terms,
            )
            loss = reduce_rows(values, counted.weight, counted.denominator, reduction)
        else:
            solver = LogitKD(terms, load_backend(impl), cast)
            tensors = (logits, source, teacher_weight, teacher_bias, labels)
            # A few classes cost more in calls than in memory: take the gradient along instead of starting again.
            small = logits.numel() <= SMALL_LOGITS and logits.dtype != torch.float16
            loss = row_loss(
                solver, tensors, counted.weight, counted.denominator, reduction, gradient_in_forward=small
            )
    return loss.reshape(leading) if reduction == "none" else loss


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
    static_shapes: bool = False,
    mode: Mode = "fast",
    chunk_bytes: int | None = None,
    vocab_group: object | None = None,
    logit_dtype: torch.dtype | None = None,
) -> Tensor:
    """`kd_loss` straight from hidden states and heads: the (N, V) logits never exist as a whole.

    Replaces:

        student_logits = F.linear(student_hidden, student_weight, student_bias)
        teacher_logits = F.linear(teacher.hidden, teacher.weight, teacher.bias)
        loss = kd_loss(student_logits, teacher_logits, labels, ...)

    Args:
        student_hidden: (..., D_s), float16, bfloat16, float32 or float64: what enters the student's head.
        student_weight: (V, D_s), the student's head; no work is spent on its gradient when it is frozen.
        teacher: TeacherHead(hidden (..., D_t), weight (V, D_t), bias (V,)), or logits (..., V) as a tensor or
            TeacherLogits. Frozen; D_t and the dtype may differ from the student's.
        labels: (...) int64 class ids; needed for ce_weight != 0. Without labels every row counts.
        student_bias: (V,), the bias of the student's head.
        divergence: "forward_kl" (default), "reverse_kl", "jsd", or an object: ForwardKL(), ReverseKL(), JSD(beta).
            The other divergences are not supported yet.
        temperature: plain number above 0; both distributions of the divergence are taken at it. Default 1.0.
        kd_weight, ce_weight: plain numbers before the divergence and before the cross entropy. Defaults 1.0
            and 0.0. The cross entropy is of the student at temperature 1.
        t_squared: multiply the divergence, value and gradient, by temperature squared. Default True.
        ignore_index: rows with this label do not count, whatever else they hold. Default -100.
        token_weight: (...) floating, one factor per row, without gradient. Default: 1 for each row.
        reduction: "mean" (default) divides the sum by the number of counted rows, by the sum of their
            `token_weight` when given, or by `num_items_in_batch`; "sum"; "none" gives shape (...), 0 in rows
            that do not count.
        num_items_in_batch: a number or a 0-D tensor, which stays on its device. For gradient accumulation:
            the counted rows of all micro-batches together.
        impl: None (default) takes triton for CUDA and ROCm tensors and torch elsewhere; "triton", "torch" and
            "reference" (eager float32) are taken as asked, never replaced.
        label_smoothing, softcap, logit_scale, vocab_map, return_stats: not supported yet.
        static_shapes: keep rows that do not count in the products instead of gathering the others first.
            Reading their number is the only time the host waits for the device. Default False.
        chunk_bytes: size of the two float32 buffers of logits together, which sets how many tokens are worked
            on at a time. Default: chosen by the back end.
        mode, vocab_group, logit_dtype: only "fast", None and None are supported yet.

    Returns:
        float32 (float64 for float64 inputs): 0-D, or (...) for reduction="none". Without a counted row a
        finite 0 that still has a graph.

    Logits are float32 out of the product for every input dtype. Gradients have the dtypes of their inputs; for
    "mean" and "sum" they are computed together with the value. The loss has no second derivative
    (impl="reference" does). Under autocast hidden states and weights are cast as F.linear casts them.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit; a teacher that requires grad.
        NotImplementedError: an option that is not supported yet.

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
    teacher = checks.check_teacher(teacher, same_dtype=cast is None)
    checks.check_pair("student_hidden", student_hidden, vocabulary, teacher)
    checks.check_rows(
        "student_hidden", student_hidden, vocabulary, labels, token_weight, ce_weight, ignore_index
    )
    impl = resolve_impl(impl, student_hidden.device, student_weight.dtype)

    leading = student_hidden.shape[:-1]
    hidden = _flat(student_hidden)
    source, teacher_weight, teacher_bias = _teacher_tensors(teacher)
    labels = None if labels is None else labels.reshape(-1).long()
    token_weight = None if token_weight is None else token_weight.reshape(-1)
    with autocast_off(hidden):
        counted = _count(hidden, labels, ignore_index, token_weight, num_items_in_batch)
        if impl == "reference":
            if counted.weight is not None:
                hidden = hidden.masked_fill((counted.weight == 0).unsqueeze(1), 0.0)
            student = reference.linear(_cast(hidden, cast), _cast(student_weight, cast), student_bias)
            values = reference.kd_row_losses(
                student,
                _reference_teacher(source, teacher_weight, teacher_bias, cast),
                labels,
                counted.weight,
                terms,
            )
            loss = reduce_rows(values, counted.weight, counted.denominator, reduction)
        else:
            index = None if static_shapes else compact_rows(counted.weight, labels, vocabulary)
            solver = LinearKD(
                terms, load_backend(impl), chunk_bytes, cast, _half_bound(terms, cast or student_weight.dtype)
            )
            tensors = (
                hidden, student_weight, student_bias, source, teacher_weight, teacher_bias, labels, index
            )  # fmt: skip
            loss = row_loss(
                solver, tensors, counted.weight, counted.denominator, reduction, gradient_in_forward=True
            )
    return loss.reshape(leading) if reduction == "none" else loss


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _reference_teacher(
    source: Tensor, weight: Tensor | None, bias: Tensor | None, cast: torch.dtype | None
) -> Tensor:
    if weight is None:
        return reference.wide(source)
    return reference.linear(_cast(source, cast), _cast(weight, cast), bias)
