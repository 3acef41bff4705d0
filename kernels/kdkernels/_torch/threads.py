"""Row work of the CPU on several threads: each takes rows of its own through all passes, and none waits for the others in between.

Torch would split every pass over its threads and wait for the slowest each time, some twelve times a block: one core that is
busy with other work then slows all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
# A fork has none of its parent's threads.
os.register_at_fork(after_in_child=_pools.clear)


def share_rows(work: Callable[[slice], None], rows: int, workers: int) -> None:
    """work(slice) for consecutive slices that together are all rows, one for each worker."""
    if workers == 1:
        work(slice(0, rows))
        return
    inference = torch.is_inference_mode_enabled()

    def isolated(here: slice) -> None:  # the modes of the caller are those of its thread only
        with torch.inference_mode(inference), torch.no_grad():
            work(here)

    size = -(-rows // workers)
    shares = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    futures = [_pool(workers).submit(isolated, here) for here in shares]
    wait(futures)
    for future in futures:
        future.result()


def _pool(workers: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    key = workers, threads
    if key not in _pools:
        started = Barrier(workers + 1)

        def start() -> None:
            torch.get_num_threads()  # the first call in a thread sets what all threads have
            torch.set_num_threads(threads // workers)
            started.wait()

        _pools[key] = ThreadPoolExecutor(workers, "kdkernels", initializer=start)
        for _ in range(workers):
            _pools[key].submit(int)
        started.wait()
        torch.set_num_threads(threads)  # threads that start later take the last value that any thread has set
    return _pools[key]
