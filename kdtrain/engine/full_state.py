"""Whole tensors out of models and optimizers that FSDP2 has sharded, and back. Without shards nothing is copied."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_state(owner: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """The `state_dict()` of a model or optimizer with every tensor whole. All processes take part.

    Of a weight under several names (tied heads) the first name is kept: `load_state` knows the others.
    Shards are joined one at a time; only the first process keeps the result, on the host.
    """
    if isinstance(owner, nn.Module):
        again = repeated_names(owner)
        return {name: _whole(value) for name, value in owner.state_dict().items() if name not in again}
    state = owner.state_dict()
    joined = {
        i: {name: _whole(value) for name, value in entry.items()} for i, entry in state["state"].items()
    }
    return {"state": joined, "param_groups": state["param_groups"]}


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model the weights that `whole_state` gave, sharded as the model is. All processes take part."""
    own = model.state_dict()
    state = {name: _cut_as(own[name], value) if name in own else value for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - repeated_names(model):
        raise RuntimeError(f"weights that do not fit: missing {missing}, unexpected {unexpected}")


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer the state that `whole_state` gave, sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        i: {
            name: _cut_as(parameters[i], value) if value.shape == parameters[i].shape else value
            for name, value in entry.items()
        }
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})


def joined(value: Tensor) -> Tensor:
    """A tensor whole, on every process. All processes take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def repeated_names(model: nn.Module) -> set[str]:
    """The further names of parameters and buffers that a model holds under several."""
    first = {
        name
        for named in (model.named_parameters(), model.named_buffers())  # each gives a tensor once
        for name, _ in named
    }
    return set(model.state_dict()) - first


def _whole(value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    whole = joined(value)
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def _cut_as(model: Tensor, value: Tensor) -> Tensor:
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
