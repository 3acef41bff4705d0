"""The error a result may have, from the arithmetic of its formula: no other computation's luck enters.

`rounding.truths` tells for every entry the error that float32 has to expect. A result may have a few times that, since its
order of operations is its own, and one rounding to its own dtype.
"""

import math

import torch
from torch import Tensor

from tests.support.rounding import Truth

# (error / bound, what) of every comparison since the list was last cleared.
ratios: list[tuple[float, str]] = []


def assert_within_budget(actual: Tensor, truth: Truth, name: str) -> None:
    """Assert that the root mean square and the largest of the errors lie within their bounds.

    rms:     (2 + 4 / sqrt(n)) rms(spread) + eps rms(truth) for n entries
    largest: 6 max(spread) + eps max(truth)

    with the eps of the result's dtype, and the smallest number that it has beside eps |truth|. A single entry may be six
    standard deviations away; the mean over many is known better.
    """
    actual, exact = actual.detach(), truth.value
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    kind = torch.finfo(actual.dtype)
    error = (actual.double() - exact).abs()
    step = kind.eps * exact.abs() + kind.eps * kind.tiny
    for norm, factor, what in (
        (_rms, 2.0 + 4.0 / math.sqrt(exact.numel()), "rms"),
        (torch.max, 6.0, "largest"),
    ):
        found, expected, one_step = (norm(part).item() for part in (error, truth.spread, step))
        bound = factor * expected + one_step
        ratios.append((found / bound, f"{name}, {what}"))
        # `not <=` also fails for NaN.
        if not found <= bound:
            raise AssertionError(
                f"{name}: {what} error {found:.3e}, expected of float32 {expected:.3e}, one step of {actual.dtype} {one_step:.3e}"
            )


def _rms(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()
