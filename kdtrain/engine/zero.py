"""ZeRO 3 of DeepSpeed, as transformers' Trainer sets it up: which weights it has sharded, and how to see them whole."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.integrations import deepspeed as integration


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether each process holds only a shard of every weight."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.zero_stage == 3


def zero3_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sharded weights, by all their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if hasattr(parameter, "ds_tensor")}


@contextmanager
def gathered_weights(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sharded weights are whole for as long as this lasts; all processes take part. Nothing happens without weights."""
    weights = list(weights)
    if not weights:
        yield
        return
    zero: Any = import_module("deepspeed.runtime.zero")  # where weights are sharded so, it is installed
    with zero.GatheredParameters(weights, modifier_rank=None):
        yield


@contextmanager
def loading_whole() -> Iterator[None]:
    """Models that are loaded meanwhile are not sharded, whatever configuration transformers knows."""
    known = integration._hf_deepspeed_config_weak_ref and integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if known is not None:
            integration.set_hf_deepspeed_config(known)
