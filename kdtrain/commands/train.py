"""kdtrain train RECIPE."""

import argparse

from kdtrain.recipe import describe_fields, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"fields of a recipe, with their defaults:\n{describe_fields()}"
    parser.add_argument("recipe", help="YAML file; any field can follow, as in --training.learning_rate 3e-4")


def main(arguments: argparse.Namespace) -> int:
    """Train, measure, save."""
    recipe = load_recipe(
        arguments.recipe, arguments.overrides
    )  # a wrong recipe is told before torch is loaded
    from kdtrain.run import run

    run(recipe)
    return 0
