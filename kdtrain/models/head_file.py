"""A causal language model of which only the head is read: the body runs elsewhere."""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdtrain.errors import KdtrainError
from kdtrain.models.heads import head_of
from kdtrain.models.loading import blaming, load_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def empty_model(path: str, field: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this configuration on the meta device, without weights.

    Args:
        path: a folder or hub id.
        field: the recipe key that is blamed.
        dtype: of the weights.
    """
    config = load_config(path, field)
    with blaming(path, field, "model"), init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def read_head(model: PreTrainedModel, path: str, field: str) -> None:
    """Give a model of `empty_model` the head of a checkpoint. Of files that an index names only that of the head is opened.

    Raises:
        KdtrainError: no head is found there, or one of another shape.
    """
    head, embeddings, layer = head_of(model), model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    for name, parameter in (("weight", head.weight), ("bias", head.bias)):
        if parameter is None:
            continue
        names = [key for key, one in model.named_parameters(remove_duplicate=False) if one is parameter]
        with blaming(path, field, "head"):
            value = read_tensor(path, names).to(parameter.dtype)
        if value.shape != parameter.shape:
            raise KdtrainError(
                f"{field}: the head in {path} has the shape {tuple(value.shape)}, the configuration says {tuple(parameter.shape)}"
            )
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    if tied:
        embeddings.weight = layer.weight  # type: ignore[union-attr]


def read_tensor(folder: str, names: list[str]) -> torch.Tensor:
    """The tensor that has one of these names, from the one file that holds it.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in files_with(folder, names):
        with safe_open(path, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                if name in names:
                    return content.get_tensor(name)
    raise FileNotFoundError(f"no safetensors file there holds {' or '.join(names)}")


def files_with(folder: str, names: list[str]) -> list[Path]:
    """The safetensors files that may hold one of these tensors."""
    index = fetched(folder, INDEX)
    if index is None:
        single = fetched(folder, SINGLE)
        return [single] if single is not None else sorted(Path(folder).glob("*.safetensors"))
    places = json.loads(index.read_text()).get("weight_map", {})
    found = [fetched(folder, places[name]) for name in names if name in places]
    return [path for path in found if path is not None]


def fetched(folder: str, name: str) -> Path | None:
    """A file of a folder or of a repository on the hub; None where it has no such file."""
    if Path(folder).is_dir():
        path = Path(folder) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(folder, name))
    except EntryNotFoundError:
        return None
