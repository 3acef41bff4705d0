"""What `contextual_relation_loss` refuses, each by its sentence."""

import re
from typing import Any

import pytest
import torch

from kdkernels import contextual_relation_loss

STUDENT, TEACHER = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"teacher": torch.zeros(1, 3, 5, 6)}, "student and teacher must have the same batch, got 2 and 1"),
        ({"teacher": torch.zeros(2, 3, 4, 6)}, "student and teacher must have the same length, got 5 and 4"),
        (
            {"teacher": torch.zeros(2, 7, 5, 6)},
            "student and teacher must have the same number of layers, got 3 and 7 "
            "(shapes (2, 3, 5, 4) and (2, 7, 5, 6))",
        ),
        (
            {"student": torch.zeros(2, 5, 4)},
            "student and teacher must have shapes (B, L, N, D_s) and (B, L, N, D_t) with widths above 0, "
            "got (2, 5, 4) and (2, 3, 5, 6); stack the layers on axis 1",
        ),
        ({"student": torch.zeros(2, 3, 5, 0)}, "with widths above 0"),
        ({"student": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, "student must be float16, bfloat16"),
        ({"teacher": [1.0]}, "teacher must be a tensor, got list"),
        ({"teacher": TEACHER.clone().requires_grad_()}, "teacher requires grad, but the teacher is frozen"),
        ({"teacher": TEACHER.to("meta")}, "teacher is on meta and student on cpu"),
        (
            {"window": 0},
            "window must be at least 1, got 0; it counts the neighbours on either side of a token",
        ),
        ({"window": 2.0}, "window must be a whole number, got 2.0"),
        (
            {"mask": torch.ones(2, 5)},
            "mask must be a bool tensor, True where a token counts, got torch.float32; use mask.bool()",
        ),
        ({"mask": [[True]]}, "mask must be a bool tensor, True where a token counts, got list"),
        (
            {"mask": torch.ones(2, 3, 5, dtype=torch.bool)},
            "mask must have shape (2, 5), one entry for each token of student (2, 3, 5, 4), got (2, 3, 5)",
        ),
        ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "mask is on meta and student on cpu"),
        ({"distance_weight": float("nan")}, "distance_weight must be finite, got nan"),
        ({"angle_weight": "1"}, "angle_weight must be a plain number, got str"),
        ({"layer_weight": torch.ones(())}, "layer_weight must be a plain number, got Tensor"),
        ({"variant": "paper"}, "variant must be one of 'study', 'official', got 'paper'"),
        ({"average": "rows"}, "average must be one of 'relations', 'samples', got 'rows'"),
        ({"impl": "cuda"}, "impl must be one of 'triton', 'torch', 'reference', got 'cuda'"),
    ],
)
def test_refusals(change: dict[str, Any], sentence: str) -> None:
    arguments = {"student": STUDENT, "teacher": TEACHER, **change}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        contextual_relation_loss(**arguments)


def test_float64_is_not_for_triton() -> None:
    with pytest.raises(ValueError, match="would lose the digits of float64 inputs"):
        contextual_relation_loss(STUDENT.double(), TEACHER.double(), impl="triton")
