"""Accelerate, set up for one run: precision, device, and how processes share the work."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from kdtrain.engine.trackers import FOLDER, check_trackers
from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingSection

KERNELS_KEPT = 16
"""How many of its compiled kernels oneDNN keeps on a CPU: GELU and its gradient have one for every number of tokens, and each lies
in the heap between larger blocks, which then fit nowhere. Its own 1,024 cost 1 to 4 MB a step; a run of 3.4 million parameters held 8 GB."""


def start_accelerator(
    training: TrainingSection, *, sharded: bool = False, folder: Path | None = None
) -> Accelerator:
    """Accelerate for this run; each run of a process may have its own precision.

    Args:
        training: the training section of the recipe.
        sharded: whether FSDP2 may shard the student.
        folder: of the run, for its trackers; None starts none.

    Raises:
        KdtrainError: a precision that does not work here, sharding that the task does not support, or DeepSpeed.
    """
    check_trackers(training)
    # Accelerate keeps one global state a process and refuses a second precision unless it is cleared.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = training.precision
    if precision == "fp32":  # bfloat16 matmuls are oneDNN's too: they need more than these
        # oneDNN reads it before its first kernel; who set it keeps it.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.accelerator.is_available():
        # Otherwise accelerate takes each process for a run of its own.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise KdtrainError(
            "kdtrain train shards with FSDP2 and not with DeepSpeed; use recipes/accelerate/fsdp2.yaml, or KDTrainer, which has "
            "DeepSpeed through transformers"
        )
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(training.report_to) if folder and training.report_to else None,
            project_dir=None if folder is None or not training.report_to else str(folder / FOLDER),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=training.ddp_timeout))],
        )
    except ValueError as error:
        raise KdtrainError(f"training.precision {precision} does not work on this machine: {error}") from None
    if accelerator.num_processes != world:
        raise KdtrainError(
            f"{world} processes were started (WORLD_SIZE), but each of them is a run of its own here; start with accelerate launch, "
            "or with torchrun and without ACCELERATE_USE_CPU=false"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in fp32 in silence
        raise KdtrainError(
            "training.precision fp16 needs a GPU, as nothing scales the loss on a CPU; use bf16 or fp32"
        )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env(
        "ACCELERATE_USE_FSDP"
    ):
        # Accelerate takes FSDP from its configuration on every device but the CPU, where it would run DDP in silence.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not sharded:
        raise KdtrainError(
            "FSDP is for kdtrain train with task: code_lm, whose models are the large ones; use DDP here (recipes/accelerate/ddp.yaml)"
        )
    return accelerator
