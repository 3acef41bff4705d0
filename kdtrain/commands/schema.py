"""kdtrain schema [TASK]."""

import argparse
import json

from kdtrain.methods import METHODS
from kdtrain.recipe.presets import STUDY
from kdtrain.recipe.schema import json_schema, run_schema
from kdtrain.study.plan import StudyRecipe
from kdtrain.tasks.recipes import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task."""
    parser.add_argument(
        "task", choices=(*RECIPES, "study"), help="the `task:` of the recipes that the schema describes"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print a JSON schema; editors complete and check YAML with it."""
    if arguments.task == "study":
        found = json_schema(StudyRecipe)
    else:
        methods = {name: kind.Options for name, kind in METHODS.items() if arguments.task in kind.tasks}
        found = run_schema(RECIPES[arguments.task], methods, presets=STUDY)
    print(json.dumps(found, indent=2))
    return 0
