"""Exact fused knowledge-distillation losses."""

__version__ = "0.1.0"
