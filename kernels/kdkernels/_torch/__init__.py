"""The torch back end: the same design on any device, tuned for CPUs."""

from . import contextual
from .features import direction_rows, mse_rows
from .few_rows import few_rows
from .relations import RELATION_STATE, relation_rows
from .rows import ROW_STATE, kd_rows
from .sizes import chunk_rows
from .softmax import row_statistics, softmax_gradient
from .tiles import tile_gradient, tile_statistics, tile_sums

__all__ = [
    "RELATION_STATE",
    "ROW_STATE",
    "chunk_rows",
    "contextual",
    "direction_rows",
    "few_rows",
    "kd_rows",
    "mse_rows",
    "relation_rows",
    "row_statistics",
    "softmax_gradient",
    "tile_gradient",
    "tile_statistics",
    "tile_sums",
]
