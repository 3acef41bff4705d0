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


def error_over_bound(actual: Tensor, truth: Truth) -> dict[str, float]:
    """The root mean square and the largest of the errors, each over its bound; NaN for a result with a NaN.

    rms:     (2 + 4 / sqrt(n)) rms(spread) + eps rms(truth) for n entries
    largest: 6 max(spread) + eps max(truth)

    with the eps of the result's dtype. The rounding of a single entry may be six standard deviations away; over many entries
    the mean square is known better. `eps |truth|` is two roundings, and at least the smallest number of the dtype.
    """
    actual, exact = actual.detach(), truth.value
    kind = torch.finfo(actual.dtype)
    error = (actual.double() - exact).abs()
    step = kind.eps * exact.abs() + kind.eps * kind.tiny
    rms = (2.0 + 4.0 / math.sqrt(exact.numel())) * _rms(truth.spread) + _rms(step)
    largest = 6.0 * truth.spread.max() + step.max()
    return {"rms": (_rms(error) / rms).item(), "largest": (error.max() / largest).item()}


def assert_within_budget(actual: Tensor, truth: Truth, name: str) -> None:
    """Assert that the errors of a result lie within their bounds, and keep how near they are."""
    shape, expected = tuple(actual.shape), tuple(truth.value.shape)
    assert shape == expected, f"{name}: shape {shape}, expected {expected}"
    if truth.value.numel() == 0:
        return
    for what, ratio in error_over_bound(actual, truth).items():
        if ratio == ratio:  # a NaN is no measure of anything
            ratios.append((ratio, f"{name}, {what}"))
        if not ratio <= 1.0:  # fails for NaN too
            raise AssertionError(
                f"{name}: the {what} error is {ratio:.3g} times what its arithmetic explains"
            )


def _rms(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()
