"""Low-rank adapters on a student: its weights stay as they are, beside each adapted one stands the product of two thin ones.

weight = base + lora_alpha / lora_rank * B @ A      # B (out, rank) starts at 0, A (rank, in) at random; both are trained
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageStudentSection

NAME = "default"
"""of the one adapter, as peft calls it"""


def add_adapters(model: PreTrainedModel, recipe: LanguageStudentSection) -> None:
    """Put adapters into a model, in place, and freeze everything else.

    Raises:
        KdtrainError: peft is not installed, or the recipe names layers that the model lacks, or its head.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise KdtrainError(
            "student.lora_rank needs peft, which is not installed; pip install peft, or set student.lora_rank: 0"
        ) from None
    targets = list(recipe.lora_targets)
    head = model.get_output_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is head)
    if any(f".{name}".endswith(f".{target}") for target in targets):
        raise KdtrainError(
            f"student.lora_targets {targets} adapt the head, which has to stay one matrix; leave it out"
        )
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # pyright: ignore[reportArgumentType] a float does as well
        lora_dropout=recipe.lora_dropout,
        target_modules=targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise KdtrainError(
            f"student.lora_targets {targets} do not fit {type(model).__name__}: {error}"
        ) from None


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The layers with an adapter by their names; none for a model without."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged_student(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A plain model of the same family whose weights are those of `state` with the adapters added to them.

    Args:
        model: the model with adapters, whose tensors are not read: they may be sharded.
        state: its state with whole tensors.
    """
    merged = dict(state)
    for name, layer in adapted_layers(model).items():
        down, up = (merged.pop(f"{name}.lora_{side}.{NAME}.weight").float() for side in ("A", "B"))
        change = layer.scaling[NAME] * (up @ down)
        for tensor in ("weight", "bias"):
            if f"{name}.base_layer.{tensor}" in merged:
                merged[f"{name}.{tensor}"] = merged.pop(f"{name}.base_layer.{tensor}")
        base = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (base.float() + (change.T if layer.fan_in_fan_out else change)).to(
            base.dtype
        )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
    missing, unexpected = plain.load_state_dict(merged, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, tensor in plain.state_dict().items() if tensor.is_meta]
    if left or unexpected:
        raise RuntimeError(
            f"adapters could not be merged: missing {left or missing}, unexpected {unexpected}"
        )
    return plain
