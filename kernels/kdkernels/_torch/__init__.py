"""The torch back end: the same design on any device, tuned for CPUs."""

from . import windows
from .features import direction_rows
from .rows import chunk_rows, kd_rows, mse_rows

__all__ = ["chunk_rows", "direction_rows", "kd_rows", "mse_rows", "windows"]
