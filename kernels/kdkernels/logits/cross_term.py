"""`teacher_cross_term`: what a teacher comes to when the student's head is frozen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core import checks
from ..core.matmul import TILE_ROWS, accum_dtype, autocast_off
from ..core.rows import flat
from ..core.transform import transformed_logits
from ..options import LogitTransform
from ..teachers import TeacherCrossTerm, TeacherHead, TeacherLogits
from . import teacher_checks
from .teacher_rows import TeacherLogitSource

# Rows of teacher logits held at a time; the GEMMs are float32 for half heads too, since they run once.
CHUNK_ROWS = 256


@torch.no_grad()
def teacher_cross_term(
    teacher: Tensor | TeacherLogits | TeacherHead,
    student_weight: Tensor,
    student_bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> TeacherCrossTerm:
    """Average the student's frozen head under the teacher, once, for `linear_kd_loss` without a teacher in the step.

    Replaces, some tokens at a time:

        p_t = F.softmax(teacher_logits / T, -1)
        cross, bias = p_t @ student_weight, p_t @ student_bias
        entropy = -(p_t * p_t.log()).sum(-1)

    Args:
        teacher: logits (..., V) as a tensor or TeacherLogits, or TeacherHead(hidden (..., D_t), weight (V, D_t), ...).
        student_weight: (V, D_s), the head that the student is trained with and that stays as it is.
        student_bias: (V,), the bias of that head. Default None.
        temperature: plain number above 0, the temperature of the loss. Default 1.0.

    Returns:
        TeacherCrossTerm: cross (..., D_s), bias and entropy (...) in float32 (float64 for a float64 head). In a step they
            cost D_s numbers per token of storage, no teacher and no GEMM with its head. Keep them in float32: the gradient
            is a difference of two averages of the head, and a cross-term rounded to bfloat16 leaves 0.2 % of the
            average in it, which is more than the difference once the student is near its teacher.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a teacher that requires grad.

    Source: forward KL written as log sum exp(s / T) - <p_t, s> / T - H(p_t), in which <p_t, s> is linear in the hidden state.
    """
    checks.check_temperature(temperature)
    teacher = teacher_checks.check_full_teacher(teacher)
    rows = teacher.hidden if isinstance(teacher, TeacherHead) else teacher.logits
    vocabulary = teacher.weight.shape[0] if isinstance(teacher, TeacherHead) else rows.shape[-1]
    teacher_checks.check_averaged_head(student_weight, student_bias, vocabulary, rows)

    bias, transform = None, LogitTransform()
    if isinstance(teacher, TeacherHead):
        bias, transform = teacher.bias, LogitTransform(float(teacher.scale), teacher.softcap)
        teacher = replace(teacher, hidden=flat(teacher.hidden))
    else:
        teacher = TeacherLogits(flat(teacher.logits))
    wide, device = accum_dtype(student_weight.dtype), student_weight.device
    count = rows.numel() // max(rows.shape[-1], 1)
    cross = torch.zeros((count, student_weight.shape[1]), dtype=wide, device=device)
    mean_bias, entropy = torch.zeros((2, count), dtype=wide, device=device)
    with autocast_off(student_weight):
        logits_of = TeacherLogitSource.prepare(teacher, None, None, min(CHUNK_ROWS, count))
        for start in range(0, count, CHUNK_ROWS):
            here = slice(start, min(start + CHUNK_ROWS, count))
            logits = logits_of.logits(here)
            logits = logits.to(wide, copy=isinstance(teacher, TeacherLogits))  # they are overwritten
            transformed_logits(logits, bias, transform, logits)
            log_p = torch.log_softmax(logits.div_(temperature), -1)
            p = torch.exp(log_p, out=logits)
            # Entries of probability 0 may have a logarithm of -inf.
            entropy[here] = -torch.linalg.vecdot(p, log_p.masked_fill_(p == 0, 0.0))
            if student_bias is not None:
                mean_bias[here] = p @ student_bias.to(wide)
            for tile in range(0, vocabulary, TILE_ROWS):
                columns = slice(tile, tile + TILE_ROWS)
                cross[here].addmm_(p[:, columns], student_weight[columns].to(wide))
    shape = rows.shape[:-1]
    return TeacherCrossTerm(
        cross.reshape(*shape, student_weight.shape[1]),
        mean_bias.reshape(shape),
        entropy.reshape(shape),
        float(temperature),
    )
