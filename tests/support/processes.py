"""Real processes that talk over gloo, for what only several of them can show."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.support import commands


def run_processes(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` in `world` processes; what each returned (tensors in plain containers), by rank.

    The function must be importable: a function of a test module. An exception in any process fails the test.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    whole = (function, world, port, str(folder), arguments)
    start_processes(_process, whole, nprocs=world, start_method=commands.START_METHOD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _process(
    rank: int, function: Callable[..., Any], world: int, port: int, folder: str, arguments: Any
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
