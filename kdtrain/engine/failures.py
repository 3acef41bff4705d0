"""What ends a run in the middle of a step, as one sentence: which process, why, and where the same command resumes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed

from kdtrain.engine.checkpoint import latest_checkpoint
from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingSection

ROLL_CALL_SECONDS = 3.0
"""How long processes may take to answer before they are taken to be gone."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")
LOST_CONNECTION = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out",
)


@contextmanager
def failures_told(training: TrainingSection, folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """The block trains the run in `folder`: memory that ran out and lost processes become sentences."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        way_on = resumes_at(folder)
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            raise KdtrainError(out_of_memory(error, training, accelerator, way_on)) from None
        lost = isinstance(error, distributed.DistError) or any(
            words in str(error) for words in LOST_CONNECTION
        )
        if accelerator.num_processes > 1 and lost:
            raise KdtrainError(lost_processes(error, accelerator, training, way_on)) from None
        raise


def resumes_at(folder: Path) -> str:
    """Where the same command starts next time."""
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        return "no checkpoint was written yet, so the same command starts from the beginning"
    return f"the same command resumes at step {int(path.name.removeprefix('step-'))} ({path})"


def out_of_memory(
    error: BaseException, options: TrainingSection, accelerator: Accelerator, way_on: str
) -> str:
    """The fields that make a step smaller."""
    fields = [f"raise training.gradient_accumulation_steps (now {options.gradient_accumulation_steps})"]
    if not options.gradient_checkpointing:
        fields.append("set training.gradient_checkpointing: true")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rpartition(
        "DefaultCPUAllocator: "
    )[2]
    several = accelerator.num_processes > 1
    name = f"process {accelerator.process_index} of {accelerator.num_processes}" if several else "the run"
    return (
        f"{name} ran out of memory on {accelerator.device} ({reason[:200]}); {' or '.join(fields)}, which changes memory and "
        f"not the result, or use more devices; {way_on}"
    )


def lost_processes(
    error: BaseException, accelerator: Accelerator, options: TrainingSection, way_on: str
) -> str:
    """Which processes do not answer. Only the first that does says so; the others end in silence."""
    count = accelerator.num_processes
    gone = missing_processes(accelerator.process_index, count)
    if accelerator.process_index != next((rank for rank in range(count) if rank not in gone), 0):
        raise SystemExit(1)
    if not gone:
        reason = f"the connection between the processes broke ({str(error).splitlines()[0][:200]})"
    else:
        which = f"process{'es' if len(gone) > 1 else ''} {', '.join(map(str, gone))} of {count}"
        silent = (
            f"has not answered for {options.ddp_timeout} s (training.ddp_timeout): it hangs or was stopped"
        )
        ended = "ended in the middle of training: killed (by hand, by a scheduler, for want of memory), or by an error of its own"
        reason = f"{which} {silent if 'imed out' in str(error) else ended}"
    return f"{reason}; {way_on}"


def missing_processes(rank: int, count: int) -> list[int]:
    """The processes that do not answer at the store where all met; none when there is nowhere left to ask."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"kdtrain/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}/left"
    try:
        store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=ROLL_CALL_SECONDS),
        )
        store.set(f"{prefix}/{rank}", "1")
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        while True:
            gone = [one for one in range(count) if not store.check([f"{prefix}/{one}"])]
            if not gone or time.monotonic() > deadline:
                return gone
            time.sleep(0.05)
    except (KeyError, ValueError, RuntimeError):  # the process that kept the store is gone
        return [0] if rank else []
