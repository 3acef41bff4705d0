"""A lean loop that distils code models with the losses of kdkernels."""

import importlib
from typing import TYPE_CHECKING, Any

from kdtrain.errors import KdtrainError
from kdtrain.models.registration import register_models

if TYPE_CHECKING:
    from kdtrain.hf_trainer import KDConfig, KDTrainer
    from kdtrain.run import run as train
    from kdtrain.tasks.recipes import load_recipe

register_models()  # so that AutoModelForSequenceClassification loads BiGRU students

__all__ = ["KDConfig", "KDTrainer", "KdtrainError", "load_recipe", "train"]

_PLACES = {
    "KDConfig": ("kdtrain.hf_trainer", "KDConfig"),
    "KDTrainer": ("kdtrain.hf_trainer", "KDTrainer"),
    "load_recipe": ("kdtrain.tasks.recipes", "load_recipe"),
    "train": ("kdtrain.run", "run"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
