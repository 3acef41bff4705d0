"""Good calls of the losses with some arguments changed, and the sentence with which such a call is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdkernels import kd_loss, linear_kd_loss, projection_mse
from tests.support.inputs import DEVICE, make_case


def linear(**changes: Any) -> torch.Tensor:
    """`linear_kd_loss` on a good case with some arguments changed."""
    case = make_case()
    arguments: dict[str, Any] = {
        "student_hidden": case.student_hidden,
        "student_weight": case.student_weight,
        "teacher": case.teacher,
        "labels": case.labels,
        "student_bias": case.student_bias,
    }
    return linear_kd_loss(**{**arguments, **changes})


def plain(**changes: Any) -> torch.Tensor:
    """`kd_loss` on a good case with some arguments changed."""
    case = make_case()
    arguments: dict[str, Any] = {
        "student_logits": case.student_logits,
        "teacher": case.teacher_logits,
        "labels": case.labels,
    }
    return kd_loss(**{**arguments, **changes})


def mse(**changes: Any) -> torch.Tensor:
    """`projection_mse` on good features with some arguments changed."""
    arguments: dict[str, Any] = {
        "student": torch.randn(5, 3, device=DEVICE),
        "teacher": torch.randn(5, 4, device=DEVICE),
        "weight": torch.randn(4, 3, device=DEVICE),
    }
    return projection_mse(**{**arguments, **changes})


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def refused(
    call: Callable[..., Any], sentence: str, kind: type[Exception] = ValueError, **changes: Any
) -> None:
    """The call raises exactly this sentence."""
    with pytest.raises(kind) as caught:
        call(**changes)
    assert str(caught.value) == sentence
