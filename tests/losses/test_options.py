"""An option is spelled in the signature of a loss, in the TypedDict of its module and in the checks: all the same."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from kdkernels import kd_loss, linear_kd_loss
from kdkernels.logits.problem import check_options
from kdkernels.options import KDOptions, LinearKDOptions

# Keywords that differ from call to call, so that a module does not store them.
PER_CALL = {"token_weight", "num_items_in_batch", "student_bias"}


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function by name."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("function", "stored"), [(kd_loss, KDOptions), (linear_kd_loss, LinearKDOptions)], ids=["kd", "linear_kd"]
)
def test_modules_store_the_options_of_their_function(function: Callable[..., Any], stored: type) -> None:
    ours = {name: hint for name, hint in get_type_hints(function).items() if name in keywords(function)}
    assert {name: hint for name, hint in ours.items() if name not in PER_CALL} == get_type_hints(stored)


@pytest.mark.parametrize("function", [kd_loss, linear_kd_loss], ids=["kd", "linear_kd"])
def test_checks_have_the_defaults_of_the_function(function: Callable[..., Any]) -> None:
    ours, checked = keywords(function), keywords(check_options)
    assert set(ours) - {"token_weight", "student_bias"} <= set(checked)
    for name in set(ours) & set(checked):
        assert ours[name].default == checked[name].default, name
    if function is linear_kd_loss:  # which has every option there is
        assert set(checked) <= set(ours)
