"""Triton kernels of the logit losses, in reading order: rows, online, passes, divergence; row and labels load."""
