"""kdtrain train RECIPE."""

import argparse
from dataclasses import asdict

from kdtrain.console import add_output_options, result
from kdtrain.tasks.recipes import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; any field can be overridden."""
    parser.add_argument("recipe", help="YAML file; any field can be set, as in --training.learning_rate 3e-4")
    add_output_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Train, measure, save."""
    recipe = load_recipe(
        arguments.recipe, arguments.overrides
    )  # a wrong one is refused before torch is loaded
    from accelerate import PartialState

    from kdtrain.run import run

    summary = run(recipe)
    if (arguments.json or arguments.quiet) and PartialState().is_main_process:  # else the run has told it
        result(arguments, summary.line(), asdict(summary))
    return 0
