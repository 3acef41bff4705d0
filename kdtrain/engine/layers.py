"""Layers of a student that are recomputed in backward."""

from torch import nn

from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingSection


def set_up_layers(student: nn.Module, options: TrainingSection) -> None:
    """Recompute the layers of a student, in place, as the recipe says.

    Raises:
        KdtrainError: the student has no layers that can be recomputed.
    """
    name = type(student).__name__
    if options.gradient_checkpointing and not recompute_layers(student):
        raise KdtrainError(
            f"training.gradient_checkpointing: {name} cannot recompute its layers; set it to false, or raise "
            "training.gradient_accumulation_steps"
        )


def recompute_layers(student: nn.Module) -> bool:
    """Keep only the inputs of the layers for backward, which runs each of them once more; whether the model can."""
    # A pair of texts goes through an encoder of its own.
    parts = [
        module for module in student.modules() if getattr(module, "supports_gradient_checkpointing", False)
    ]
    if not parts:
        return False
    # Older releases of transformers 5 only have gradient_checkpointing_enable.
    enable = (
        getattr(parts[0], "activation_checkpointing_enable", None) or parts[0].gradient_checkpointing_enable
    )
    enable()  # type: ignore[operator]
    return True
