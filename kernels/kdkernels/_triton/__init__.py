"""Triton back end: row kernels and their launchers. Imported only when a call runs on it."""

from . import windows
from .configs import chunk_rows
from .directions import direction_rows
from .projection import mse_rows
from .relations import RELATION_GRADIENT_IN_FORWARD, relation_rows
from .rows import kd_rows
from .sparse import row_statistics, softmax_gradient
from .tile_rows import tile_gradient, tile_statistics, tile_sums

__all__ = [
    "RELATION_GRADIENT_IN_FORWARD",
    "chunk_rows",
    "direction_rows",
    "kd_rows",
    "mse_rows",
    "relation_rows",
    "row_statistics",
    "softmax_gradient",
    "tile_gradient",
    "tile_statistics",
    "tile_sums",
    "windows",
]
