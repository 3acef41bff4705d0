"""Windows of neighbours on the Triton back end; the contract is `features.contextual.backend.WindowBackend`."""

import torch
from torch import Tensor

from .angles import angle_gradient, angle_values
from .direct import direct_angles, direct_rows
from .products import Rows

__all__ = [
    "Rows",
    "angle_gradient",
    "angle_values",
    "block_rows",
    "direct_angles",
    "direct_rows",
    "row_elements",
    "widen",
]

# Rows of a block: many, as a block is some hundred launches.
MAX_ROWS = 1 << 16


def block_rows(device: torch.device) -> int:
    """The most rows to relate at a time."""
    return MAX_ROWS


def row_elements(student_width: int, teacher_width: int, offsets: int) -> int:
    """Elements of scratch for one row: pairs only, as features are read where they are."""
    return 16 * offsets


def widen(near: Tensor) -> bool:
    """Never: these kernels compute in float32, and asking would be a host sync."""
    return False
