"""The torch back end: the same design on any device, tuned for CPUs."""

from .rows import chunk_rows, kd_rows, mse_rows

__all__ = ["chunk_rows", "kd_rows", "mse_rows"]
