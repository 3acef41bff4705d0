"""Accelerator, checkpoints, full state dicts, interrupts."""
