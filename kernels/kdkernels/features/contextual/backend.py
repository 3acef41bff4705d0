"""What a back end has to supply for `contextual_relation_loss`, beside the functions of `core.backend.Backend`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...core.bands import AngleGradient, AngleSide, DirectAngles


class Rows(Protocol):
    """One side of a block as a stream of R rows x_i; a masked row is 0, whatever it holds."""

    dtype: torch.dtype  # of the inner products: float32 or float64

    def __init__(
        self,
        features: Tensor,  # (b, q, m, D), any strides but the last
        valid: Tensor | None,  # (R,) bool; None: all b * q * m rows are valid
        rows: int,  # R: b * q * m filled up to a multiple of ROW_STEP
        margin: int,  # the widest that `products` and `apply` will reach
        dtype: torch.dtype,
    ) -> None: ...

    def centre(self) -> None:
        """Subtract each sequence's mean from here on: differences stay, inner products shrink."""
        ...

    def products(self, out: Tensor) -> None:  # (K + 1, R), last axis contiguous
        """out[d, i] = <x_i, x_{i + d}>."""
        ...

    def apply(
        self,
        factors: Tensor,  # (2 K + 1, R)
        out: Tensor,  # (b, q, m, D), any strides
    ) -> None:
        """out[i] += sum over a of factors[a, i] * x_{i + a}."""
        ...


class WindowBackend(Protocol):
    """The module `contextual` of `_torch` and `_triton`; bands and directed pairs are those of `core.bands`."""

    Rows: type[Rows]

    @staticmethod
    def block_rows(device: torch.device) -> int:
        """The most rows to relate at a time."""
        ...

    @staticmethod
    def row_elements(student_width: int, teacher_width: int, offsets: int) -> int:
        """Elements of scratch for one row of a block that is related to so many others."""
        ...

    @staticmethod
    def angle_values(student: AngleSide, teacher: AngleSide) -> Tensor:  # (R,)
        """Sums of squared differences of cosines, over ordered pairs of neighbours."""
        ...

    @staticmethod
    def angle_gradient(student: AngleSide, teacher: AngleSide) -> AngleGradient:
        """`angle_values`, and derivatives of their sum by the student's band, lifts and scales."""
        ...

    @staticmethod
    def widen(near: Tensor) -> bool:  # (R,) bool
        """Whether a block of float32 rows with these nearly equal neighbours is computed again in float64."""
        ...

    @staticmethod
    def direct_rows(near: Tensor) -> Tensor:  # (R,) bool
        """Which rows `direct_angles` takes over: at least those marked."""
        ...

    @staticmethod
    def direct_angles(
        block: DirectAngles,
        grad: Tensor | None,  # (b, q, m, D_s), the gradient times row_scale is added
    ) -> Tensor:  # (R,)
        """As `angle_values` of the chosen rows and 0 for the others, from differences of features."""
        ...
