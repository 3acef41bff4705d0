"""SIGTERM and SIGINT as a wish: the loop saves a checkpoint after the step at work and ends. A second signal ends at once."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import distributed

from kdtrain.console import say
from kdtrain.engine.failures import resumes_at
from kdtrain.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_WISH = 1.0
"""Seconds in which further signals count as the first: a terminal and torchrun both pass a Ctrl-C on."""


class StopSignals:
    """While the block runs, signals are kept as a number that `agreed` returns on all processes at the same step.

    Outside of the main thread Python delivers no signals, and nothing is handled.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.number, self.since = 0, 0.0
        self.several = accelerator.num_processes > 1
        self.before: dict[int, Any] = {}
        # Hosts agree over gloo: what a GPU still has to do is not waited for.
        self.group = None
        if self.several and distributed.get_backend() != "gloo":
            handler = accelerator.init_handler
            self.group = distributed.new_group(backend="gloo", timeout=handler and handler.timeout)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal that any process of the run has received, 0 for none. All processes call this once a step."""
        if not self.several:
            return self.number
        found = torch.tensor(self.number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return int(found)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() < self.since + ONE_WISH:
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number, self.since = number, time.monotonic()
        with suppress(RuntimeError):  # it may have come in the middle of a line
            say(
                f"kdtrain: {signal.Signals(number).name}: a checkpoint is saved after this step; a second signal ends at once"
            )


def stopped(
    number: int, step: int, total_steps: int, folder: Path, accelerator: Accelerator
) -> BaseException:
    """What ends a run that has saved its checkpoint after a signal. One process tells it."""
    if not accelerator.is_main_process:
        return SystemExit(128 + number)
    name = signal.Signals(number).name
    return Stopped(f"stopped by {name} at step {step} of {total_steps}; {resumes_at(folder)}", number)
