"""Triton kernels of `relation_kl`: rows launches values and gradients."""
