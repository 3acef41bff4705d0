"""Options of the losses, and the plain numbers that a row function takes.

Axis letters: N tokens, V vocabulary, D width (D_s student, D_t teacher), B batch, L layers,
K kept teacher entries, T temperature, C classes. Student before teacher, labels last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor

from .divergences import Divergence, ForwardKL

Reduction = Literal["mean", "sum", "none"]
Impl = Literal["triton", "torch", "reference"]
Mode = Literal["fast", "low_memory"]
Project = Literal["student", "teacher"]
# Between two features: |p - y|^2, |p/|p| - y/|y||^2, 1 - cosine of their angle.
Distance = Literal["squared", "normalized", "cosine"]

IGNORE_INDEX = -100

# A feature shorter than this has no direction: it is taken as the zero vector, and gets no gradient.
NORM_EPS = 1e-12


@dataclass(frozen=True)
class LogitTransform:
    """What makes logits of a head's output z: softcap * tanh(scale * z / softcap), or scale * z without a softcap.

    A bias is part of z. Gradients are with respect to z.
    """

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        """True where the logits are z."""
        return self.scale == 1.0 and self.softcap is None


@dataclass(frozen=True)
class RowTerms:
    """What one token's loss is made of: kd_scale * D(p_t, p_s) + ce_weight * CE(labels, student at T=1).

    All fields are plain numbers (the weights of `Decoupled` come as tensors, one value per row, beside the terms). A
    kernel takes them as run-time arguments, so that a new temperature or weight does not recompile.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    t_squared: bool = True
    label_smoothing: float = 0.0
    student_transform: LogitTransform = field(default_factory=LogitTransform)
    teacher_transform: LogitTransform = field(default_factory=LogitTransform)

    @property
    def kd_scale(self) -> float:
        """The factor of the divergence: kd_weight, times T squared unless that was turned off."""
        return self.kd_weight * (self.temperature**2 if self.t_squared else 1.0)

    def loss(self, kd: Tensor, ce: Tensor) -> Tensor:
        """(R,) the loss of each row from its divergence and cross entropy."""
        if self.kd_scale == 0.0:
            kd = kd.nan_to_num(0.0, 0.0, 0.0)  # it may be infinite where it only is a statistic
        loss = kd * self.kd_scale
        return loss if self.ce_weight == 0.0 else loss.add(ce, alpha=self.ce_weight)

    def reads_teacher(self, stats: bool) -> bool:
        """False where nothing that is wanted depends on the teacher; with `stats` numbers of it are wanted."""
        return stats or self.kd_scale != 0.0


class LossOptions(TypedDict, total=False):
    """The keywords of `kd_loss` that do not change what it returns; meanings and defaults are in its docstring."""

    divergence: str | Divergence
    temperature: float
    kd_weight: float
    ce_weight: float
    label_smoothing: float
    t_squared: bool
    ignore_index: int
    reduction: Reduction
    softcap: float | None
    logit_scale: float
    vocab_map: str | Tensor | None
    impl: Impl | None
    check_finite: bool


class LinearLossOptions(LossOptions, total=False):
    """The keywords of `linear_kd_loss` that do not change what it returns."""

    static_shapes: bool
    mode: Mode
    chunk_bytes: int | None
    vocab_group: object | None
    logit_dtype: torch.dtype | None


class KDOptions(LossOptions, total=False):
    """The keywords of `kd_loss` that a module stores."""

    return_stats: bool


class LinearKDOptions(LinearLossOptions, total=False):
    """The keywords of `linear_kd_loss` that a module stores."""

    return_stats: bool
