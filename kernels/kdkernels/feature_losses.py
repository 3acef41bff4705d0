"""Losses between inner layers: `projection_mse`."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from . import checks, reference
from .autograd import reduce_rows, row_loss
from .backends import load_backend, resolve_impl
from .chunked import ProjectionMSE
from .counting import count_rows
from .logit_losses import autocast_dtype, autocast_off
from .matmul import wide_dtype
from .options import Impl, Project, Reduction

# Twice the size of the differences that float16 gradients have to hold without overflow, see `autograd.Solver`.
HALF_BOUND = 32.0


def projection_mse(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    project: Project = "student",
    normalize: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """Mean squared error between projected student features and teacher features.

    Replaces, without keeping the projection or the difference for backward:

        loss = F.mse_loss(F.linear(student, weight, bias)[mask], teacher[mask])   # project="student"
        loss = F.mse_loss(student[mask], F.linear(teacher, weight, bias)[mask])   # project="teacher"

    Args:
        student: (..., D_s), float16, bfloat16, float32 or float64.
        teacher: (..., D_t), frozen; its dtype may differ when it is not the projected side.
        weight: (D_t, D_s) for project="student", (D_s, D_t) for project="teacher"; None compares the
            features as they are and needs D_s == D_t.
        bias: (D_t,) or (D_s,), as the rows of `weight`. Only with `weight`.
        project: which side is mapped onto the other's width. Default "student".
        normalize: not supported yet.
        mask: (...) bool, True where a row counts; None counts every row.
        reduction: "mean" divides the sum by counted rows times width, as F.mse_loss of the counted rows;
            "sum" adds up the counted rows; "none" gives each row's sum of squared differences, shape (...),
            0 where the mask is False.
        impl: None takes triton for CUDA and ROCm tensors, torch elsewhere; "reference" is eager float32.

    Returns:
        float32 (float64 for float64 features): 0-D, or (...) for reduction="none". A mask without a True
        gives a finite 0 with a graph.

    Gradients reach student, weight and bias, in their own dtypes. The loss has no second derivative.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a teacher that requires grad.
        NotImplementedError: normalize=True.

    Source: the hidden-state objective of FitNets (Romero et al., 2015) and TinyBERT (Jiao et al., 2020).
    """
    checks.check_choice("project", project, get_args(Project))
    checks.refuse_unbuilt(normalize=(normalize, False))
    checks.check_reduction(reduction, None)
    checks.check_impl(impl)
    cast = autocast_dtype(student) if isinstance(student, Tensor) else None
    checks.check_features(student, teacher, weight, bias, project, same_dtype=cast is None)
    checks.check_mask(mask, student)
    impl = resolve_impl(impl, student.device, student.dtype)

    leading, width = student.shape[:-1], (teacher if project == "student" else student).shape[-1]
    student, teacher = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    with autocast_off(student):
        counted = count_rows(
            student.shape[0],
            None if mask is None else mask.reshape(-1),
            None,
            None,
            student.device,
            wide_dtype(student.dtype),
        )
        denominator = counted.denominator * width
        if impl == "reference":
            values = reference.projection_row_losses(
                student, teacher, weight, bias, counted.weight, project, None if weight is None else cast
            )
            loss = reduce_rows(values, counted.weight, denominator, reduction)
        else:
            dtype = student.dtype if weight is None else cast or weight.dtype
            solver = ProjectionMSE(
                load_backend(impl), project, cast, HALF_BOUND if dtype == torch.float16 else None
            )
            loss = row_loss(
                solver,
                (student, teacher, weight, bias),
                counted.weight,
                denominator,
                reduction,
                gradient_in_forward=True,
            )
    return loss.reshape(leading) if reduction == "none" else loss
