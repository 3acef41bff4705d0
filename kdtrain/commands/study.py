"""kdtrain study RECIPE."""

import argparse
import csv
from pathlib import Path

from kdtrain.console import add_output_options, result
from kdtrain.study.plan import load_study, unfold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.add_argument("recipe", help="YAML file; any field can be set, as in --seeds '[0]' or --workers 1")
    add_output_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the grid, or what is left of it, and print the report."""
    study = load_study(arguments.recipe, arguments.overrides)
    unfold(study)  # every wrong cell is told before torch is loaded
    from kdtrain.study.study import run_study

    report = run_study(study)
    result(arguments, report, read_table(Path(study.output)) if arguments.json else None)
    return 0


def read_table(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The cells and runs of a study's report, as its CSV files have them."""
    return {
        name: list(csv.DictReader((folder / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
        for name in ("table", "runs")
    }
