"""kdtrain study RECIPE."""

import argparse

from kdtrain.study.plan import load_study, unfold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.add_argument("recipe", help="YAML file; any field can be set, as in --seeds '[0]' or --workers 1")


def main(arguments: argparse.Namespace) -> int:
    """Run the grid, or what is left of it, and print the report."""
    study = load_study(arguments.recipe, arguments.overrides)
    unfold(study)  # every wrong cell is told before torch is loaded
    from kdtrain.study.study import run_study

    print(run_study(study))
    return 0
