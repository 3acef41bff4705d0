"""The error a result may have: twice that of plain eager PyTorch at the same dtype, plus one rounding step."""

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, low_precision: Tensor, fp64: Tensor, name: str) -> None:
    """Assert max |actual - fp64| <= 2 max |low_precision - fp64| + eps(actual.dtype) max |fp64|.

    `low_precision` is the eager result for the same inputs in their own dtype, `fp64` the truth.
    """
    actual, low_precision, fp64 = actual.detach(), low_precision.detach(), fp64.detach()
    assert actual.shape == fp64.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(fp64.shape)}"
    if fp64.numel() == 0:
        return
    error = (actual.double() - fp64).abs().max().item()
    eager_error = (low_precision.double() - fp64).abs().max().item()
    step = torch.finfo(actual.dtype).eps * fp64.abs().max().item()
    # `not <=` also fails for NaN.
    if not error <= 2.0 * eager_error + step:
        raise AssertionError(f"{name}: error {error:.3e}, eager error {eager_error:.3e}, one step {step:.3e}")
