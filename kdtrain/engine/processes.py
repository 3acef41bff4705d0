"""What the processes of a run wait for outside of training, where one of them may work for hours."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from torch import distributed

PREPARATION = timedelta(days=30)
"""The other processes wait as long as the first one needs; one that ends is noticed at once."""


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The block in the first process, then in the others, with no limit of time. (accelerate's own ends by `ddp_timeout`.)"""
    if accelerator.num_processes == 1:
        yield
        return
    group: Any = distributed.new_group(backend="gloo", timeout=PREPARATION)
    if not accelerator.is_main_process:
        try:
            distributed.barrier(group=group)
        except RuntimeError:  # the first one has ended, and has said why
            raise SystemExit(1) from None
    yield
    if accelerator.is_main_process:
        distributed.barrier(group=group)
