"""The command `kdtrain`. Every sub-command is a module with `add_arguments(parser)` and `main(arguments) -> int`."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from kdtrain.console import say
from kdtrain.errors import KdtrainError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "kdtrain.commands.demo",
        "the whole story on this machine in minutes: data, teacher, students, table, plots",
    ),
    "data": ("kdtrain.commands.data", "build a data set, or convert a public one"),
    "train": ("kdtrain.commands.train", "train one student as a recipe says"),
    "cache": ("kdtrain.commands.cache", "store the teacher's outputs that a recipe needs"),
    "serve-command": (
        "kdtrain.commands.serve_command",
        "print the command of a vLLM server that runs the teacher of a recipe",
    ),
    "evaluate": ("kdtrain.commands.evaluate", "measure a finished run again, or compare it with another"),
    "doctor": ("kdtrain.commands.doctor", "what can be told about a recipe before any training"),
    "study": ("kdtrain.commands.study", "a grid of methods, students, tasks and seeds: table, figure, costs"),
}
"""Name, module and one line of help; a module is imported only when its command runs."""


RESUMED = ("demo", "train", "cache", "study")
"""Commands that keep what they have done when they are stopped."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; user errors are one line and code 2."""
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        prog="kdtrain",
        description="Distil code models: a small one learns from a large one.",
        epilog="Try `kdtrain demo` first. `kdtrain COMMAND --help` lists what a command takes; of train, cache and study "
        "also every field of a recipe. Recipes to start from are in recipes/ of the repository.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in words[:1]:
            importlib.import_module(module).add_arguments(command)
    arguments, overrides = parser.parse_known_args(words)
    module = importlib.import_module(COMMANDS[arguments.command][0])
    if hasattr(arguments, "recipe"):  # any field of a recipe can be overridden: --training.learning_rate 3e-4
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return module.main(arguments)
    except KdtrainError as error:
        say(f"kdtrain: {error}")
        return error.code
    except KeyboardInterrupt:
        again = "; run the same command to resume" if arguments.command in RESUMED else ""
        say(f"kdtrain: interrupted{again}")
        return 130
    except BrokenPipeError:  # the reader of what is printed is gone, as with `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 128 + signal.SIGPIPE
