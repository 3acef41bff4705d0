"""DeepSpeed's ZeRO under the loop: set up for it, and weights and optimizer state as whole tensors.

The loop keeps its own arithmetic: the loss is a sum over one global count, the rate comes from the recipe's schedule, weights
and optimizer state stay float32, and checkpoints are the same files. DeepSpeed spreads optimizer state (ZeRO 1), gradients
(ZeRO 2) and weights (ZeRO 3).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from transformers.integrations import deepspeed as integration

from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingRecipe

FLAT_WEIGHTS = {
    "single_partition_of_fp32_groups": "flat_weights",
    "fp32_partitioned_groups_flat": "flat_parts",
}
"""Where ZeRO 1 and 2, and where ZeRO 3 keep float32 weights end to end, and their names in a checkpoint. ZeRO 3 cuts
every weight, the others all of a group at once: neither reads what the other wrote."""


def start_deepspeed(options: TrainingRecipe, *, spread_weights: bool) -> Accelerator:
    """Accelerate with DeepSpeed as its configuration says.

    Args:
        spread_weights: whether ZeRO 3 will do.

    Raises:
        KdtrainError: DeepSpeed is not installed, ZeRO 0, ZeRO 3 where it does not do, or precision fp16.
    """
    if options.precision == "fp16":
        raise KdtrainError(
            "training.precision fp16 needs a loss scale that DeepSpeed would keep for itself; use bf16"
        )
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # accelerate starts no processes of its own for DeepSpeed on a CPU
    try:
        accelerator = Accelerator(mixed_precision="no")
    except ImportError as error:
        raise KdtrainError(f"the configuration asks for DeepSpeed: {error}") from None
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin.zero_stage not in (1, 2, 3):
        raise KdtrainError(
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} spreads nothing; use 2, or 3 to spread weights too, or "
            "recipes/accelerate/ddp.yaml"
        )
    if plugin.zero_stage == 3 and not spread_weights:
        raise KdtrainError(
            "DeepSpeed's ZeRO stage 3 is for kdtrain train with task: code_lm, whose models are the large ones; use stage 2 here"
        )
    integration.unset_hf_deepspeed_config()  # or ZeRO 3 would cut models while they are loaded and checked
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used for nothing: the loop cuts its batches itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.clip_norm,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    return accelerator


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainingRecipe
) -> tuple[Any, Any]:
    """Model and optimizer as accelerate wraps them; under DeepSpeed the products are in the recipe's precision too."""
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and options.precision == "bf16":
        # What ZeRO 3 has let go of must not stay behind as a bfloat16 copy.
        keep = not spreads_weights(accelerator)
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16, cache_enabled=keep)
        wrapped.forward = autocast(wrapped.forward)
    return wrapped, optimizer


def piece_of_batch(accelerator: Accelerator, model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """For one piece of a batch: gradients are exchanged, and under DeepSpeed the step is taken, with the last one only."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.sync_gradients = last
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def spreads_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds but a part of every weight (ZeRO 3)."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.zero_stage == 3


def spread_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that ZeRO 3 has cut into a part for each process, by all their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if hasattr(parameter, "ds_tensor")}


@contextmanager
def gathered_weights(weights: Iterable[nn.Parameter], *, change: bool = False) -> Iterator[None]:
    """Spread weights whole for as long as this lasts; with `change` they are then what the first process made of them.

    All processes take part. Nothing happens where none is spread.
    """
    weights = list(weights)
    if not weights:
        yield
        return
    zero: Any = import_module("deepspeed.runtime.zero")  # who has spread weights has DeepSpeed
    with zero.GatheredParameters(weights, modifier_rank=0 if change else None):
        yield


@contextmanager
def loading_whole() -> Iterator[None]:
    """Models loaded in here are not cut by ZeRO 3, whatever configuration transformers has been told of."""
    known = integration._hf_deepspeed_config_weak_ref and integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if known is not None:
            integration.set_hf_deepspeed_config(known)


def flat_parts(optimizer: Any) -> tuple[str, list[Tensor]] | None:
    """What a checkpoint calls the flat weights of which DeepSpeed gave this process a part, and those parts; None without."""
    zero = getattr(optimizer, "optimizer", None)
    return next(
        ((name, getattr(zero, place)) for place, name in FLAT_WEIGHTS.items() if hasattr(zero, place)), None
    )


def written_flat(state: dict[str, Any]) -> bool:
    """Whether an optimizer state out of a checkpoint is DeepSpeed's."""
    return any(name in state["state"].get(0, {}) for name in FLAT_WEIGHTS.values())


def whole_zero_state(wrapper: Any, name: str, parts: list[Tensor]) -> dict[str, Any]:
    """The state of each run of flat weights, the parts of all processes end to end; only the first process has it."""
    zero = wrapper.optimizer
    state = {}
    for i, part in enumerate(parts):
        entry = {name: part.data, **zero.optimizer.state[part]}
        state[i] = {
            key: _gathered(value) if value.shape == part.shape else value for key, value in entry.items()
        }
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in zero.optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def load_zero_state(wrapper: Any, name: str, parts: list[Tensor], state: dict[str, Any]) -> None:
    """Give each process its part back, for as many processes as there were."""
    zero, rank, count = wrapper.optimizer, distributed.get_rank(), distributed.get_world_size()
    if name not in state["state"].get(0, {}):
        raise KdtrainError(
            "the checkpoint was written under another ZeRO stage, which cuts the optimizer's state otherwise; go on under that one"
            if written_flat(state)
            else "the checkpoint was not written under DeepSpeed, which cuts the optimizer's state otherwise; go on without it"
        )
    for i, part in enumerate(parts):
        for key, stored in state["state"].get(i, {}).items():
            if stored.numel() == 1:  # the count of steps
                own = stored.clone()
            elif stored.numel() == count * part.numel():
                own = stored.view(count, -1)[rank].view_as(part).to(part)
            else:
                raise KdtrainError(
                    f"the checkpoint holds DeepSpeed's state cut for another number of processes than the {count} that go on; "
                    "start as many as wrote it"
                )
            if key == name:
                part.data.copy_(own)
            else:  # not there before the first step
                zero.optimizer.state[part][key] = own
    for group, stored in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in stored.items() if key != "params"})


def _gathered(part: Tensor) -> Tensor:
    first = distributed.get_rank() == 0
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())] if first else None
    distributed.gather(part.contiguous(), parts)
    return torch.cat([one.cpu().view(-1) for one in parts]) if parts is not None else part.new_empty(0)
