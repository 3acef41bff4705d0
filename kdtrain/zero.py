"""DeepSpeed's ZeRO 1 and 2 under the loop: set up for it, and its optimizer state as whole tensors.

The loop keeps its own arithmetic: the loss is a sum over one global count, the rate comes from the recipe's schedule, weights
and optimizer state stay float32, and checkpoints are the same files. DeepSpeed spreads optimizer state and gradients.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn

from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingRecipe

FLAT_WEIGHTS = "flat_weights"
"""in a checkpoint: a group's float32 weights end to end, which tell DeepSpeed's state from others"""


def start_deepspeed(options: TrainingRecipe) -> Accelerator:
    """Accelerate with DeepSpeed as its configuration says.

    Raises:
        KdtrainError: DeepSpeed is not installed, another stage than ZeRO 1 or 2, or precision fp16.
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
    if plugin.zero_stage not in (1, 2):
        raise KdtrainError(
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported: stage 2 spreads optimizer state and gradients; to "
            "spread weights too use recipes/accelerate/fsdp2.yaml"
        )
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
        wrapped.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(wrapped.forward)
    return wrapped, optimizer


def piece_of_batch(accelerator: Accelerator, model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """For one piece of a batch: gradients are exchanged, and under DeepSpeed the step is taken, with the last one only."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.sync_gradients = last
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def is_zero(optimizer: Any) -> bool:
    """Whether DeepSpeed has cut this optimizer's state into one flat part for each process."""
    return hasattr(getattr(optimizer, "optimizer", None), "single_partition_of_fp32_groups")


def whole_zero_state(wrapper: Any) -> dict[str, Any]:
    """The state of each parameter group, the parts of all processes end to end; only the first process has it."""
    zero = wrapper.optimizer
    state = {}
    for i, part in enumerate(zero.single_partition_of_fp32_groups):
        entry = {FLAT_WEIGHTS: part.data, **zero.optimizer.state[part]}
        state[i] = {
            name: _gathered(value) if value.shape == part.shape else value for name, value in entry.items()
        }
    return {"state": state, "param_groups": zero.optimizer.state_dict()["param_groups"]}


def load_zero_state(wrapper: Any, state: dict[str, Any]) -> None:
    """Give each process its part back, for as many processes as there were."""
    zero, rank, count = wrapper.optimizer, distributed.get_rank(), distributed.get_world_size()
    if FLAT_WEIGHTS not in state["state"].get(0, {}):
        raise KdtrainError(
            "the checkpoint was not written under DeepSpeed, which cuts the optimizer's state otherwise; go on without it"
        )
    for i, part in enumerate(zero.single_partition_of_fp32_groups):
        for name, stored in state["state"][i].items():
            if stored.numel() == 1:  # the count of steps
                own = stored.clone()
            elif stored.numel() == count * part.numel():
                own = stored.view(count, -1)[rank].view_as(part).to(part)
            else:
                raise KdtrainError(
                    f"the checkpoint holds DeepSpeed's state cut for another number of processes than the {count} that go on; "
                    "start as many as wrote it"
                )
            if name == FLAT_WEIGHTS:
                part.data.copy_(own)
            else:  # not there before the first step
                zero.optimizer.state[part][name] = own
    for group, stored in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
        group.update({name: value for name, value in stored.items() if name != "params"})


def _gathered(part: Tensor) -> Tensor:
    first = distributed.get_rank() == 0
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())] if first else None
    distributed.gather(part.contiguous(), parts)
    return torch.cat([one.cpu().view(-1) for one in parts]) if parts is not None else part.new_empty(0)
