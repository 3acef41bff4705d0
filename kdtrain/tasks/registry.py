"""The tasks, by name. A task is imported when it is first used."""

import importlib
from typing import Any

from kdtrain.errors import KdtrainError
from kdtrain.recipe import RunRecipe
from kdtrain.tasks.base import Task

TASKS = {
    "classification": "kdtrain.tasks.classification.task:Classification",
    "masked_lm": "kdtrain.tasks.masked_lm.task:MaskedLM",
    "code_lm": "kdtrain.tasks.code_lm.task:CodeLM",
}


def task_of(recipe: RunRecipe) -> type[Task[Any]]:
    """The task of a recipe."""
    return task_named(recipe.task)


def task_named(name: str) -> type[Task[Any]]:
    """The task of this name.

    Raises:
        KdtrainError: there is none.
    """
    if name not in TASKS:
        raise KdtrainError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, _, kind = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), kind)
