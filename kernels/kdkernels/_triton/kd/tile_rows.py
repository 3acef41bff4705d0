"""Launchers of the work on tiles of the vocabulary."""

from typing import Literal

from torch import Tensor

from ...core.row_state import Tile
from ...divergences import Decoupled
from ...options import RowTerms
from ..aliasing import aliases_input
from ..launch import RowConfig, device_guard
from .arguments import row_arguments
from .flags import RowFlags, row_flags
from .tiles import _tile_kernel


def tile_statistics(tile: Tile, terms: RowTerms, state: Tensor, *, config: RowConfig | None = None) -> None:
    """Merge a tile into the statistics of every row; the contract is `core.backend.Backend.tile_statistics`."""
    flags = _flags(tile, terms)
    if flags.divergence != "decoupled":  # all others have the same statistics
        flags = flags._replace(divergence="forward_kl", needs_mean_pass=False)
    _launch("statistics", flags, tile, terms, state, config)


def tile_sums(tile: Tile, terms: RowTerms, state: Tensor, *, config: RowConfig | None = None) -> None:
    """Add a tile to the value and the mean slope of every row; the contract is `core.backend.Backend.tile_sums`."""
    flags = _flags(tile, terms)
    flags = flags._replace(has_labels=flags.divergence == "decoupled", has_ce=False, ce_sum="shared")
    _launch("sums", flags._replace(has_smoothing=False), tile, terms, state, config)


def tile_gradient(
    tile: Tile,
    terms: RowTerms,
    state: Tensor,  # (SLOTS, R) fp32
    *,
    vocabulary: int,
    grad: Tensor,  # (R, C)
    decoupled: tuple[Tensor, Tensor] | None = None,
    add_value: bool = False,
    config: RowConfig | None = None,
) -> None:
    """row_weight * d(row loss)/d(student) of a tile into `grad`; the contract is `core.backend.Backend.tile_gradient`."""
    flags = _flags(tile, terms, grad)
    if tile.teacher is None and not flags.has_ce:
        grad.zero_()
        return
    _launch(
        "gradient", flags, tile, terms, state, config, grad=grad, decoupled=decoupled,
        uniform=terms.label_smoothing / vocabulary, add_value=add_value and tile.teacher is not None,
    )  # fmt: skip


def _flags(tile: Tile, terms: RowTerms, grad: Tensor | None = None) -> RowFlags:
    flags = row_flags(
        terms,
        labels=tile.labels,
        student_bias=tile.student_bias,
        teacher_bias=tile.teacher_bias,
        row_weight=tile.row_weight,
        vocab_map=None,
        write_grad=grad is not None,
        aliased=grad is not None and aliases_input(grad, tile.student),
    )
    # The cross entropy is over all columns, the divergence perhaps not: its sum is always one of its own.
    return flags._replace(ce_sum="own" if flags.has_ce else "shared")


def _launch(
    work: Literal["statistics", "sums", "gradient"],
    flags: RowFlags,
    tile: Tile,
    terms: RowTerms,
    state: Tensor,
    config: RowConfig | None,
    *,
    grad: Tensor | None = None,
    decoupled: tuple[Tensor, Tensor] | None = None,
    uniform: float = 0.0,
    add_value: bool = False,
) -> None:
    """Launch one pass over one tile."""
    rows, columns = tile.student.shape
    if rows == 0 or columns == 0:
        return
    if isinstance(terms.divergence, Decoupled) and tile.labels is None:
        raise ValueError("the decoupled divergence needs labels, got None")
    arguments = row_arguments(
        flags, terms, tile.student, tile.student if tile.teacher is None else tile.teacher, tile.labels,
        biases=(tile.student_bias, tile.teacher_bias), row_weight=tile.row_weight, decoupled=decoupled, grad=grad,
        fits_default_registers=False, config=config,
    )  # fmt: skip
    with device_guard(tile.student.device):
        _tile_kernel[(rows,)](
            state_ptr=state,
            stride_state_row=state.stride(0),
            C=columns,
            offset=tile.offset,
            uniform=float(uniform),
            PASS=work,
            HAS_TEACHER=tile.teacher is not None,
            ADD_VALUE=add_value,
            **arguments,
        )
