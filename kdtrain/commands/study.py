"""kdtrain study RECIPE."""

import argparse

from kdtrain.recipe.schema import describe
from kdtrain.study.plan import StudyRecipe, load_study, unfold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"fields of a study, with their defaults:\n{describe(StudyRecipe)}\n\n"
        "The sections inside are those of a recipe of task classification: kdtrain train --help"
    )
    parser.add_argument("recipe", help="YAML file; any field can follow, as in --seeds '[0]' or --workers 1")


def main(arguments: argparse.Namespace) -> int:
    """Run the grid, or what is left of it, and print the report."""
    study = load_study(arguments.recipe, arguments.overrides)
    unfold(study)  # every wrong cell is told before torch is loaded
    from kdtrain.study.study import run_study

    print(run_study(study))
    return 0
