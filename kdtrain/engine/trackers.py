"""Trackers of a run, through accelerate: tensorboard, wandb, trackio, mlflow."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from kdtrain.errors import KdtrainError
from kdtrain.recipe import RunRecipe, TrainingSection

FOLDER = "trackers"
"""In the folder of the run: what trackers write there."""


def check_trackers(training: TrainingSection) -> None:
    """Refuse trackers that are not installed; accelerate would leave them out without a word.

    Raises:
        KdtrainError: one is missing.
    """
    for name in training.report_to:
        packages = (name, "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(package) for package in packages):
            raise KdtrainError(
                f"training.report_to {name} needs the package {name}, which is not installed; pip install {name}, or leave it out"
            )


@contextmanager
def tracked(recipe: RunRecipe, name: str, accelerator: Accelerator) -> Iterator[None]:
    """Start the trackers of a run with its recipe, and finish them however it ends.

    Args:
        name: of the run.
    """
    if not recipe.training.report_to:
        yield
        return
    accelerator.init_trackers(name, config=dict(flat(recipe.plain())))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """The fields of a recipe by their dotted names; what is no number is text, as trackers take it."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str) else str(value)
