"""The error a result may have: twice that of plain eager PyTorch at the same dtype, plus one rounding step.

Root mean squares are compared, since the largest of a few roundings is a matter of luck on either side; a
single wrong entry is caught by a looser bound on the largest error.
"""

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, low_precision: Tensor, fp64: Tensor, name: str) -> None:
    """Assert rms(actual - fp64) <= 2 rms(low_precision - fp64) + eps(actual.dtype) rms(fp64), and 5 for the maximum.

    `low_precision` is the eager result for the same inputs in their own dtype, `fp64` the truth.
    """
    actual, low_precision, fp64 = actual.detach(), low_precision.detach(), fp64.detach()
    assert actual.shape == fp64.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(fp64.shape)}"
    if fp64.numel() == 0:
        return
    ours, eager = (actual.double() - fp64).abs(), (low_precision.double() - fp64).abs()
    step = torch.finfo(actual.dtype).eps
    for norm, factor, kind in ((_rms, 2.0, "rms"), (torch.max, 5.0, "largest")):
        error, eager_error, one_step = (norm(part).item() for part in (ours, eager, step * fp64.abs()))
        # `not <=` also fails for NaN.
        if not error <= factor * eager_error + one_step:
            raise AssertionError(
                f"{name}: {kind} error {error:.3e}, eager error {eager_error:.3e}, one step {one_step:.3e}"
            )


def _rms(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()
