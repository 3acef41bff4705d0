"""The command `kdtrain`. Every sub-command is a module with `add_arguments(parser)` and `main(arguments) -> int`."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kdtrain.console import be_quiet, complain
from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import nearest


@dataclass(frozen=True)
class Command:
    """A sub-command; its module is imported only when it runs."""

    module: str
    summary: str
    recipe: bool = False
    """whether it reads a recipe, of which any field can be set on the command line"""
    resumed: bool = False
    """whether it keeps what it has done when it is interrupted"""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "kdtrain.commands.demo",
        "the whole story on this machine in minutes: data, teacher, students, table, plots",
        resumed=True,
    ),
    "data": Command("kdtrain.commands.data", "build a data set, or convert a public one"),
    "train": Command("kdtrain.commands.train", "train one student", recipe=True, resumed=True),
    "cache": Command(
        "kdtrain.commands.cache", "store the teacher's outputs that a recipe needs", recipe=True, resumed=True
    ),
    "serve-command": Command(
        "kdtrain.commands.serve_command",
        "print the command of a vLLM server that runs the teacher of a recipe",
        recipe=True,
    ),
    "evaluate": Command(
        "kdtrain.commands.evaluate", "measure a finished run again, or compare it with another"
    ),
    "doctor": Command("kdtrain.commands.doctor", "check a recipe before any training", recipe=True),
    "study": Command(
        "kdtrain.commands.study",
        "a grid of methods, students, tasks and seeds: table, figure, costs",
        recipe=True,
        resumed=True,
    ),
    "methods": Command("kdtrain.commands.methods", "list the methods, or the fields of one"),
    "schema": Command("kdtrain.commands.schema", "print the JSON schema of recipes, for editors"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that knows the names of its options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.names: set[str] = set()
        super().__init__(*arguments, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's."""
        action = super().add_argument(*names, **options)
        self.names.update(action.option_strings)
        return action


def command_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of its commands by name, still without arguments."""
    parser = Parser(
        prog="kdtrain",
        description="Distil code models: a small one learns from a large one.",
        epilog="Try `kdtrain demo` first. `kdtrain COMMAND --help` lists the arguments of a command; for train, cache and "
        "study also every field of a recipe. Example recipes are in recipes/ of the repository.",
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    return parser, {
        name: commands.add_parser(name, help=command.summary, description=command.summary)
        for name, command in COMMANDS.items()
    }


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: what follows `kdtrain` on the command line; by default those of this process.

    Returns:
        The exit code; user errors are one line and code 2.
    """
    words = list(sys.argv[1:] if words is None else words)
    parser, parsers = command_parsers()
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and words[0] == name and name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = "" if near is None else f"; did you mean {near}?"
        complain(f"kdtrain: unknown command {name}{hint} (commands: {', '.join(COMMANDS)})")
        return 2
    overrides: list[str] = []
    if words[:1] == [name] and name is not None:
        add_arguments(name, parsers[name])
        try:
            add_fields(name, parsers[name], words[1:])
        except KdtrainError as error:  # help of a recipe that is wrong
            complain(f"kdtrain: {error}")
            return error.code
        if COMMANDS[name].recipe:
            rest, overrides = split_overrides(words[1:], parsers[name].names)
            words = [name, *rest]
    arguments = parser.parse_args(words)
    arguments.overrides = overrides
    be_quiet(getattr(arguments, "quiet", False))
    command = COMMANDS[arguments.command]
    module = importlib.import_module(command.module)
    try:
        return (
            print_config(arguments) if getattr(arguments, "print_config", False) else module.main(arguments)
        )
    except KdtrainError as error:
        complain(f"kdtrain: {error}")
        return error.code
    except KeyboardInterrupt:
        again = "; run the same command to resume" if command.resumed else ""
        complain(f"kdtrain: interrupted{again}")
        return 130
    except BrokenPipeError:  # the reader of what is printed is gone, as with `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 128 + signal.SIGPIPE


def add_arguments(name: str, parser: Parser) -> Any:
    """Add the arguments of a command; returns its module."""
    module = importlib.import_module(COMMANDS[name].module)
    module.add_arguments(parser)
    if COMMANDS[name].recipe:
        parser.add_argument("--print-config", action="store_true", help="print the recipe with every default")
    return module


def add_fields(name: str, parser: Parser, words: Sequence[str]) -> None:
    """Add the fields of a recipe to the help of a command that reads one."""
    if COMMANDS[name].recipe and ("--help" in words or "-h" in words):
        from kdtrain.commands.help import recipe_help

        rest, _ = split_overrides(words, parser.names)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = recipe_help(name, next((word for word in rest if not word.startswith("-")), None))


def split_overrides(words: Sequence[str], options: set[str]) -> tuple[list[str], list[str]]:
    """Divide the words of a command into its own and the fields of the recipe, which may stand before or after it.

    Args:
        words: of the command line.
        options: names of the command's own options.
    """
    own: list[str] = []
    overrides: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in options:
            own.append(word)
            continue
        overrides.append(word)
        if "=" not in word and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return own, overrides


def print_config(arguments: argparse.Namespace) -> int:
    """Print the recipe of a command as it will be used."""
    from kdtrain.recipe.load import read_yaml, to_yaml
    from kdtrain.study.plan import study_from_dict
    from kdtrain.tasks.recipes import recipe_from_dict, task_named_in

    content = read_yaml(arguments.recipe, arguments.overrides)
    study = task_named_in(content) == "study"
    print(to_yaml(study_from_dict(content) if study else recipe_from_dict(content)), end="")
    return 0


def versions() -> str:
    """The versions of kdtrain and of the libraries that it rests on, without importing them."""
    found = []
    for name in ("kdkernels", "torch", "transformers", "accelerate"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} from source" if name == "kdkernels" else f"{name} missing")
    return f"kdtrain of {', '.join(found)}, Python {sys.version.split()[0]}"
