"""Bands of inner products and sums over angles for the torch back end; the contract is `features.contextual.backend.WindowBackend`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.bands import (
    ROW_STEP,
    AngleGradient,
    AngleSide,
    DirectAngles,
    along_steps,
    angle_cosines,
    unit_steps,
)

# Rows of one small matmul of a band: wide enough to run at full speed, few entries outside the band.
PATCH_ROWS = ROW_STEP

# Rows of a block at most: on the CPU its pairs stay in the L2 cache, elsewhere fewer calls matter more.
BLOCK_ROWS = 2048
DEVICE_BLOCK_ROWS = 1 << 16

# Share of the rows of a block with nearly equal neighbours from which on the whole block is computed in float64.
WIDEN_SHARE = 1.0 / 32.0

# Elements of the differences that angles are taken from directly, at a time.
DIRECT_ELEMENTS = 1 << 20


def block_rows(device: torch.device) -> int:
    """The most rows to relate at a time."""
    return BLOCK_ROWS if device.type == "cpu" else DEVICE_BLOCK_ROWS


def row_elements(student_width: int, teacher_width: int, offsets: int) -> int:
    """Elements of scratch for one row: copies of both sides and what is added to the gradient in float64, and pairs."""
    return 4 * student_width + 2 * teacher_width + 40 * offsets


class Rows:
    """One side of a block as contiguous rows in float32 or float64, zeros in masked rows and around the block."""

    def __init__(
        self, features: Tensor, valid: Tensor | None, rows: int, margin: int, dtype: torch.dtype
    ) -> None:
        self.shape, self.count = features.shape, features[..., 0].numel()
        self.rows, self.margin, self.dtype = rows, margin, dtype
        self.valid = None if valid is None else valid[: self.count]
        self.buffer = features.new_zeros(rows + 2 * margin, features.shape[3], dtype=dtype)
        own = self.buffer[margin : margin + self.count]
        own.view(features.shape).copy_(features)
        if self.valid is not None:
            own.masked_fill_(~self.valid.unsqueeze(1), 0.0)

    def centre(self) -> None:
        """Subtract from every valid row the mean of the valid rows of its sequence."""
        own = self.buffer[self.margin : self.margin + self.count]
        sequences = own.view(-1, self.shape[2], self.shape[3])
        if self.valid is None:
            sequences.sub_(sequences.mean(1, keepdim=True))
            return
        counted = self.valid.view(-1, self.shape[2], 1).to(own.dtype)
        mean = sequences.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min_(1.0)
        sequences.sub_(mean).mul_(counted)

    def _patches(self, buffer: Tensor, before: int, reach: int) -> Tensor:
        """(R / 32, reach, D) overlapping view: every 32nd row, `before` rows before it and those after it."""
        step, start = buffer.stride(0), self.margin - before
        return buffer[start:].as_strided(
            (self.rows // PATCH_ROWS, reach, self.shape[3]), (PATCH_ROWS * step, step, 1)
        )

    def products(self, out: Tensor) -> None:
        """out[d, i] = <x_i, x_{i + d}>.

        Multiplied in float64: a float32 matmul of long rows adds up rounding that eager's sums in pairs do not
        have, and the differences taken of these numbers would show it.
        """
        reach = PATCH_ROWS + out.shape[0] - 1
        buffer = self.buffer.double()
        left, right = self._patches(buffer, 0, PATCH_ROWS), self._patches(buffer, 0, reach)
        products = torch.bmm(left, right.transpose(1, 2))
        count = products.shape[0]
        band = products.as_strided((count, PATCH_ROWS, out.shape[0]), (PATCH_ROWS * reach, reach + 1, 1))
        out.unflatten(1, (count, PATCH_ROWS)).copy_(band.permute(2, 0, 1))

    def apply(self, factors: Tensor, out: Tensor) -> None:
        """out, shaped as the features, += sum over a of factors[a, i] * x_{i + a}."""
        offsets, count = factors.shape[0], self.rows // PATCH_ROWS
        reach = PATCH_ROWS + offsets - 1
        matrices = factors.new_zeros(count, PATCH_ROWS, reach)
        band = matrices.as_strided((count, PATCH_ROWS, offsets), (PATCH_ROWS * reach, reach + 1, 1))
        band.copy_(factors.unflatten(1, (count, PATCH_ROWS)).permute(1, 2, 0))
        total = torch.bmm(matrices, self._patches(self.buffer, offsets // 2, reach)).flatten(0, 1)
        out.add_(total[: self.count].view(self.shape))


def _cosines(side: AngleSide, difference: int, out: Tensor) -> Tensor:
    """Cosines between the neighbours a and a + difference of every row, for every a: (2 W + 1 - difference, R)."""
    count, rows = side.lift.shape[0] - difference, side.lift.shape[1]
    band = side.band[difference]
    lift, scale = side.lift, side.scale
    product = band.as_strided((count, rows), (1, 1))
    return angle_cosines(
        product, lift[:count], lift[difference:], scale[:count], scale[difference:], out[:count]
    )


def angle_values(student: AngleSide, teacher: AngleSide) -> Tensor:
    """(R,) sums of squared differences of cosines, over ordered pairs of neighbours."""
    total = torch.zeros_like(student.lift)
    scratch_s, scratch_t = torch.empty_like(total), torch.empty_like(total)
    for difference in range(1, total.shape[0]):
        error = _cosines(student, difference, scratch_s)
        error.sub_(_cosines(teacher, difference, scratch_t))
        total[: error.shape[0]].addcmul_(error, error)
    return total.sum(0).mul_(2.0)


def angle_gradient(student: AngleSide, teacher: AngleSide) -> AngleGradient:
    """`angle_values`, and derivatives of their sum by the student's band, lifts and scales."""
    offsets, rows = student.lift.shape
    window = offsets // 2
    lift, log_scale, band, total = (torch.zeros_like(student.lift) for _ in range(4))
    scratch_s, scratch_t = torch.empty_like(lift), torch.empty_like(lift)
    # Zeros on either side, so that the same pair seen from every row is a slanted column of this buffer.
    slanted = lift.new_zeros(offsets, rows + 2 * window)
    for difference in range(1, offsets):
        cosine = _cosines(student, difference, scratch_s)
        error = _cosines(teacher, difference, scratch_t)
        torch.sub(cosine, error, out=error)
        cosine.mul_(error)
        count = offsets - difference
        total[:count].addcmul_(error, error)
        log_scale[:count].add_(cosine)
        log_scale[difference:].add_(cosine)
        product = slanted[:count, window : window + rows]
        torch.mul(error, student.scale[:count], out=product).mul_(student.scale[difference:])
        lift[:count].add_(product)
        lift[difference:].add_(product)
        by_pair = slanted.as_strided((count, rows), (slanted.stride(0) - 1, 1), 2 * window)
        torch.sum(by_pair, 0, out=band[difference])
    # Squares of differences, of every unordered pair twice.
    band, lift, log_scale = (part.mul_(4.0) for part in (band, lift, log_scale))
    return AngleGradient(band, lift, log_scale, total.sum(0).mul_(2.0))


def widen(near: Tensor) -> bool:
    """Where many rows have a nearly equal neighbour: float64 is half as fast, differences a tenth, and need no second try."""
    return near.device.type == "cpu" and int(near.sum()) > WIDEN_SHARE * near.shape[0]


def direct_rows(near: Tensor) -> Tensor:
    """Which rows `direct_angles` takes over: those marked, or all where asking would be a host sync."""
    return near if near.device.type == "cpu" else torch.ones_like(near)


def direct_angles(block: DirectAngles, grad: Tensor | None) -> Tensor:
    """(R,) sums of squared differences of cosines of the chosen rows, from differences of features."""
    offsets, rows = block.valid.shape
    window, dtype = offsets // 2, block.row_scale.dtype
    values = block.row_scale.new_zeros(rows)
    chosen = torch.arange(rows, device=values.device)
    if values.device.type == "cpu":
        chosen = block.rows.nonzero().squeeze(1)
    reach = torch.arange(-window, window + 1, device=values.device)
    size = max(1, DIRECT_ELEMENTS // (offsets * (block.student.shape[-1] + block.teacher.shape[-1])))
    for centre in chosen.split(size) if len(chosen) else ():
        around = (centre.unsqueeze(1) + reach).clamp_(0, rows - 1)  # (F, V)
        counted = block.valid[:, centre].t()
        steps_s, inverse = _steps(block.student, block, centre, around, counted, dtype)
        steps_t, _ = _steps(block.teacher, block, centre, around, counted, dtype)
        error = (steps_s @ steps_s.mT).sub_(steps_t @ steps_t.mT)
        values[centre] = torch.linalg.vecdot(error.flatten(1), error.flatten(1))
        if grad is None:
            continue
        step_grad = along_steps(error.mul_(4.0) @ steps_s, steps_s, inverse)
        step_grad.mul_(block.row_scale[centre][:, None, None])
        grad.index_put_(block.places(around), step_grad, accumulate=True)
        grad.index_put_(block.places(centre), -step_grad.sum(1), accumulate=True)
    return values


def _steps(
    features: Tensor, block: DirectAngles, centre: Tensor, around: Tensor, counted: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Unit differences (F, V, D) of neighbours to their rows and 1 / length (F, V, 1); 0 where there is no direction."""
    own = features[block.places(centre)].to(dtype).unsqueeze(1)
    return unit_steps(features[block.places(around)].to(dtype).sub_(own), counted)
