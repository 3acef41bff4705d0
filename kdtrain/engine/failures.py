"""What ends a run in the middle of a step, told in one sentence: which process, why, and where the run goes on.

Three things end a run that no check could foresee: memory, a process that is gone, a machine that is taken away. Each
leaves the last checkpoint whole, so the sentence names it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from kdtrain.console import say
from kdtrain.engine.checkpoint import latest_checkpoint
from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingRecipe

Result = TypeVar("Result")
Loop = Callable[..., Result]

ROLL_CALL_SECONDS = 3.0
"""How long the others may take to answer before they are taken to be gone."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")
LOST_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def tells_failures(loop: Loop[Result]) -> Loop[Result]:
    """For a training loop `loop(recipe, model, data, evaluate, folder, accelerator)`: its failures as sentences."""

    @wraps(loop)
    def run(
        recipe: Any, model: Any, data: Any, evaluate: Any, folder: Path, accelerator: Accelerator
    ) -> Result:
        with Watch(folder, accelerator).told_to_stop() as watch:
            try:
                return loop(recipe, model, data, evaluate, folder, accelerator)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
                    raise KdtrainError(watch.out_of_memory(error, recipe.training)) from None
                if accelerator.num_processes > 1 and is_lost_connection(error):
                    watch.telling.acquire()  # kept to the end: the process speaks once
                    raise KdtrainError(watch.lost(error)) from None
                raise

    return run


class Watch:
    """What one process of a run knows of the others, and of the way on."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.device = accelerator.device
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.roll = RollCall(self.rank, self.count) if self.count > 1 else None
        self.name = f"process {self.rank} of {self.count}" if self.count > 1 else "the run"
        self.telling = threading.Lock()

    def way_on(self) -> str:
        """Where the same command starts next time."""
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return "no checkpoint was written yet, so the same command begins anew"
        return (
            f"the same command goes on from step {int(path.name.removeprefix('step-'))} ({path}), nothing before "
            "it is lost"
        )

    def out_of_memory(self, error: BaseException, options: TrainingRecipe) -> str:
        """The fields that make a step smaller."""
        fields = [f"raise training.accumulation (now {options.accumulation})"]
        if getattr(options, "checkpointing", None) is False:
            fields.append("set training.checkpointing: true")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rpartition(
            "DefaultCPUAllocator: "
        )[2]
        return (
            f"{self.name} ran out of memory on {self.device} ({reason[:200]}); {' or '.join(fields)}, which changes memory and "
            f"not the result, or use more devices; {self.way_on()}"
        )

    def lost(self, error: BaseException | None = None) -> str:
        """Which processes are gone. Only the first that is left says it; the others end in silence."""
        if self.roll is None:
            return f"the run was told to stop; {self.way_on()}"
        gone = self.roll.missing()
        left = [rank for rank in range(self.count) if rank not in gone]
        if self.rank != left[0]:
            raise SystemExit(1)
        if gone:
            which = ", ".join(map(str, gone))
            reason = (
                f"process{'es' if len(gone) > 1 else ''} {which} of {self.count} ended in the middle of training: killed (by "
                "hand, by a scheduler, for want of memory), or by an error that it told itself"
            )
        elif error is None:
            reason = f"all {self.count} processes were told to stop"
        else:
            reason = f"the connection between the processes broke ({str(error).splitlines()[0][:200]})"
        return f"{reason}; {self.way_on()}"

    @contextmanager
    def told_to_stop(self) -> Iterator["Watch"]:
        """While this lasts, SIGTERM (schedulers send it, and torchrun when a process died) leaves a sentence behind.

        A thread says it: the main thread may be waiting for a device or for a process that is gone.
        """
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield self
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        wakeup = signal.set_wakeup_fd(writing)
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)

        def wait() -> None:
            while (received := os.read(reading, 1)) not in (b"", bytes([signal.SIGTERM])):
                pass
            if received and self.telling.acquire(blocking=False):
                with suppress(SystemExit):
                    say(f"kdtrain: {self.lost()}")
                os._exit(128 + signal.SIGTERM)

        thread = threading.Thread(target=wait, name="kdtrain-sigterm", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, handler)
            os.close(writing)
            thread.join()
            os.close(reading)


class RollCall:
    """Asks which processes are left, over the store at which they met (torchrun's own outlives all of them)."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.prefix = f"kdtrain/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}/left"

    def missing(self) -> list[int]:
        """The processes that do not answer; none when there is nowhere left to ask."""
        try:
            store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=ROLL_CALL_SECONDS),
            )
            store.set(f"{self.prefix}/{self.rank}", "1")
            deadline = time.monotonic() + ROLL_CALL_SECONDS
            while True:
                gone = [rank for rank in range(self.count) if not store.check([f"{self.prefix}/{rank}"])]
                if not gone or time.monotonic() > deadline:
                    return gone
                time.sleep(0.05)
        except (KeyError, ValueError, RuntimeError):  # the process that kept the store is gone
            return [0] if self.rank else []


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is not there any more."""
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in LOST_CONNECTION)
