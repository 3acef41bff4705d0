"""kdtrain train RECIPE."""

import argparse
import importlib
from typing import Any

from kdtrain.errors import KdtrainError
from kdtrain.recipe import Recipe, describe_fields, read_recipe, task_of
from kdtrain.tasks.code_lm.recipe import LanguageRecipe
from kdtrain.tasks.masked_lm.recipe import MaskedRecipe

READERS = {
    "classification": (Recipe, "kdtrain.recipe:recipe_from_dict"),
    "masked_lm": (MaskedRecipe, "kdtrain.tasks.masked_lm.recipe:masked_recipe_from_dict"),
    "code_lm": (LanguageRecipe, "kdtrain.tasks.code_lm.recipe:language_recipe_from_dict"),
}
"""By a recipe's `task`: its class, and the function that reads it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n\n".join(
        f"fields of a recipe of task {task}, with their defaults:\n{describe_fields(kind)}"
        for task, (kind, _) in READERS.items()
    )
    parser.add_argument("recipe", help="YAML file; any field can follow, as in --training.learning_rate 3e-4")


def main(arguments: argparse.Namespace) -> int:
    """Train, measure, save."""
    content = read_recipe(arguments.recipe, arguments.overrides)
    task = task_of(content)
    if task == "study":
        raise KdtrainError(
            f"{arguments.recipe} is a study of many runs; start it with kdtrain study {arguments.recipe}"
        )
    if task not in READERS:
        raise KdtrainError(f"kdtrain train knows the tasks {', '.join(READERS)}, got task: {task}")
    recipe = _named(READERS[task][1])(content)  # a wrong recipe is refused before torch is loaded
    from kdtrain.run import run

    run(recipe)
    return 0


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
