"""kdtrain train RECIPE."""

import argparse

from kdtrain.tasks.recipes import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; any field can be overridden."""
    parser.add_argument("recipe", help="YAML file; any field can be set, as in --training.learning_rate 3e-4")


def main(arguments: argparse.Namespace) -> int:
    """Train, measure, save."""
    recipe = load_recipe(
        arguments.recipe, arguments.overrides
    )  # a wrong one is refused before torch is loaded
    from kdtrain.run import run

    run(recipe)
    return 0
