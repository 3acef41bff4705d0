"""Checkpoints of pair classifiers that others made: an encoder and CodeXGLUE's head over two first tokens."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from kdtrain.errors import KdtrainError
from kdtrain.models.loading import blaming
from kdtrain.models.pair_config import PairConfig
from kdtrain.models.pairs import PairForSequenceClassification
from kdtrain.models.strict_loading import check_finite_weights, check_names

FILE = "model.safetensors"
ENCODER_PREFIXES = ("encoder.roberta.", "roberta.", "bert.", "model.", "encoder.")
"""Under which names such checkpoints hold their encoder."""


def holds_a_pair_head(path: str, width: int) -> bool:
    """Whether a folder holds a head that reads two sentence vectors of the given width."""
    weights = Path(path) / FILE
    if not weights.is_file():
        return False
    try:
        with safe_open(weights, framework="pt") as file:
            name = "classifier.dense.weight"
            return name in file.keys() and file.get_slice(name).get_shape()[1] == 2 * width  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # whoever loads it says what is wrong


def load_pair_checkpoint(
    path: str, config: PreTrainedConfig, field: str, names: dict[str, Any]
) -> PairForSequenceClassification:
    """Load such a folder in float32.

    Args:
        path: folder with config.json (the encoder's) and model.safetensors.
        config: what config.json holds.
        field: the recipe key that is blamed.
        names: num_labels, and id2label where it is known.

    Raises:
        KdtrainError: a weight that is missing, or of another shape.
    """
    weights = Path(path) / FILE
    role = field.partition(".")[0]
    if not weights.is_file():
        raise KdtrainError(f"a {role} of pairs must be a folder with {FILE}, and {weights} is missing")
    shape = {**config.to_dict(), "model_type": config.model_type}
    model = PairForSequenceClassification(PairConfig(encoder=shape, **names))
    with blaming(path, field, "model"):
        own = {_own_name(name): tensor.float() for name, tensor in load_file(weights).items()}
    expected = model.state_dict()
    missing = sorted(expected.keys() - own.keys()) or [
        f"{name} {list(tensor.shape)} (it has {list(own[name].shape)})"
        for name, tensor in expected.items()
        if own[name].shape != tensor.shape
    ]
    if missing:
        raise KdtrainError(f"the {role} {path} is no classifier of pairs: it has no {missing[0]}")
    check_names(model, path, field, (), own.keys() - expected.keys(), {}, new_head=True)
    model.load_state_dict({name: own[name] for name in expected})
    check_finite_weights(model, path, field)
    return model


def _own_name(name: str) -> str:
    for prefix in ENCODER_PREFIXES:
        if name.startswith(prefix):
            return f"encoder.{name.removeprefix(prefix)}"
    return name
