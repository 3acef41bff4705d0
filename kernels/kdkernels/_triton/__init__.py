"""Triton back end: row kernels and their launchers. Imported only when a call runs on it."""

from . import contextual
from .directions import direction_rows
from .kd.online import ROW_STATE
from .kd.rows import kd_gradient, kd_rows
from .kd.softmax import row_statistics, softmax_gradient
from .kd.tile_rows import tile_gradient, tile_statistics, tile_sums
from .launch import chunk_rows
from .projection import mse_rows
from .relations.rows import RELATION_STATE, relation_rows

few_rows = None  # a launch costs as much for one row as for a thousand

__all__ = [
    "RELATION_STATE",
    "ROW_STATE",
    "chunk_rows",
    "contextual",
    "direction_rows",
    "few_rows",
    "kd_gradient",
    "kd_rows",
    "mse_rows",
    "relation_rows",
    "row_statistics",
    "softmax_gradient",
    "tile_gradient",
    "tile_statistics",
    "tile_sums",
]
