"""kdtrain methods [NAME]."""

import argparse
import sys

from pydantic import ValidationError

from kdtrain.console import result
from kdtrain.errors import KdtrainError
from kdtrain.methods import METHODS
from kdtrain.methods.base import Method
from kdtrain.models.loading import Shape
from kdtrain.recipe.base import nearest
from kdtrain.recipe.schema import describe, fields_schema

SHAPE = Shape(layers=12, width=8)
"""Of a model that every method can serve; what a method needs does not depend on it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name of a method."""
    parser.add_argument("name", nargs="?", help="list the fields of this method")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print what a recipe can name in `method:`."""
    if arguments.name is None:
        listed = [
            {"name": name, "summary": summary(kind), "tasks": sorted(kind.tasks), "needs": needs(kind)}
            for name, kind in METHODS.items()
        ]
        lines = [
            f"{one['name']}\n    {one['summary']}\n    tasks: {', '.join(one['tasks'])}; needs: {one['needs']}"
            for one in listed
        ]
        result(arguments, "\n".join(lines), listed)
        return 0
    if arguments.name not in METHODS:
        near = nearest(arguments.name, METHODS)
        hint = "" if near is None else f"; did you mean {near}?"
        raise KdtrainError(f"unknown method {arguments.name}{hint} (methods: {', '.join(METHODS)})")
    kind = METHODS[arguments.name]
    text = f"{arguments.name}: {summary(kind)}\n{describe(kind.Options, 'method.')}"
    result(arguments, text, fields_schema(kind.Options))
    return 0


def summary(kind: type[Method]) -> str:
    """One line: what the method is, and who published it."""
    return (sys.modules[kind.__module__].__doc__ or "").strip().partition("\n")[0]


def needs(kind: type[Method]) -> str:
    """What a method reads of the models, in words."""
    try:
        options = kind.Options()  # type: ignore[call-arg]
    except ValidationError:  # fields without a default name the teachers
        return "several teachers"
    names = kind.teachers_of(options)
    if not names:
        return "labels"
    found = kind(options, SHAPE, dict.fromkeys(names, SHAPE)).needs()
    words = ["a teacher that runs in every step" if found.live else "a teacher"]
    words += ["states of layers"] if found.layers else []
    words += ["states of every token"] if found.tokens else []
    words += ["inputs of attention"] if found.attention else []
    words += ["the whole batch at once"] if found.whole_batch else []
    return ", ".join(words)
