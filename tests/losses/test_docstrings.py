"""Docstrings of the public functions have Google sections that a parser finds, with every argument of the signature."""

import builtins
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import kdkernels

SECTION = re.compile(r"^(Args|Returns|Raises):$")
FUNCTIONS = [
    function for name in kdkernels.__all__ if inspect.isfunction(function := getattr(kdkernels, name))
]


def sections(function: Callable[..., Any]) -> dict[str, list[str]]:
    """The entries of each section: lines that are indented once, with the lines below them."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        if title := SECTION.match(line):
            current = found.setdefault(title[1], [])
        elif line and not line.startswith("    "):
            current = None
        elif current is not None and line:
            if line.startswith("     "):
                current[-1] += " " + line.strip()
            else:
                current.append(line.strip())
    return found


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_is_documented_in_the_order_of_the_signature(function: Callable[..., Any]) -> None:
    entries = [re.match(r"(\w+): (\S.*)$", entry) for entry in sections(function)["Args"]]
    assert all(entries), "an entry of Args is no `name: text`"
    names = [entry[1] for entry in entries if entry]
    assert names == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_returns_and_raises_name_types(function: Callable[..., Any]) -> None:
    found = sections(function)
    (returned,) = found["Returns"]
    kind = returned.partition(":")[0]
    assert kind in str(inspect.signature(function).return_annotation), f"Returns begins with {kind!r}"
    for entry in found["Raises"]:
        error = entry.partition(":")[0]
        assert issubclass(getattr(builtins, error), Exception)
