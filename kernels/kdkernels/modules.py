"""`nn.Module`s that store the options of a loss and call its function."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from .logits.kd_loss import kd_loss
from .logits.linear_kd_loss import linear_kd_loss
from .logits.problem import check_stored_options
from .options import KDOptions, LinearKDOptions
from .stats import KDStats
from .teachers import Teacher


class KDLoss(nn.Module):
    """`kd_loss` with its options fixed: the same keywords here, the tensors at call time.

        loss = KDLoss(temperature=2.0, ce_weight=0.5)(student_logits, teacher_logits, labels)

    Raises at construction what `kd_loss` would raise for these options.
    """

    def __init__(self, **options: Unpack[KDOptions]) -> None:
        super().__init__()
        check_stored_options("KDLoss", KDOptions.__optional_keys__, **options)
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """The loss of `kd_loss` for these tensors."""
        return kd_loss(
            student_logits,
            teacher,
            labels,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearKDLoss(nn.Module):
    """`linear_kd_loss` with its options fixed: the same keywords here, the tensors at call time.

        loss_function = LinearKDLoss(temperature=2.0, ce_weight=0.5)
        loss = loss_function(hidden, model.lm_head.weight, TeacherHead(t_hidden, t_weight), labels)

    The head's weight and bias stay the model's parameters; the module owns none.
    Raises at construction what `linear_kd_loss` would raise for these options.
    """

    def __init__(self, **options: Unpack[LinearKDOptions]) -> None:
        super().__init__()
        check_stored_options("LinearKDLoss", LinearKDOptions.__optional_keys__, **options)
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """The loss of `linear_kd_loss` for these tensors."""
        return linear_kd_loss(
            student_hidden,
            student_weight,
            teacher,
            labels,
            student_bias=student_bias,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
