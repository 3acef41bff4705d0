"""How many rows the torch back end takes at a time: logits held by a chunk, and rows of a block in scratch."""

from __future__ import annotations

import torch

from ..core.rows import equal_chunk, rows_in

# Elements of one scratch buffer on the CPU: 8 rows of 32,000. The two or three buffers that a pass touches are 1 MiB each at
# a time and fit in the L2 caches of two cores; smaller blocks cost more in calls than they save. dev/LOG.md has figures.
BLOCK_ELEMENTS = 1 << 18

# The same on other devices, where blocks only bound the scratch: 64 MiB a buffer in float32.
DEVICE_BLOCK_ELEMENTS = 1 << 24

# Threads of the CPU that take rows of their own. They share the interpreter's lock, and more of them would wait for it.
MOST_WORKERS = 4

# Rows of logits held at a time on the CPU: enough for the GEMMs to run near full speed. From a vocabulary of
# 48,000 on fewer, so that the two buffers stay within 128 MiB, down to half the rows, at which GEMMs are still fast enough.
CHUNK_ROWS, MIN_CPU_CHUNK_ROWS = 352, 176
CPU_CHUNK_BYTES = 1 << 27

# Bytes of the two logit buffers of a chunk on other devices, and the fewest rows that keep the GEMMs busy.
CHUNK_BYTES = 1 << 30
MIN_CHUNK_ROWS = 1024


def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None, device: torch.device) -> int:
    """How many rows of logits to hold at a time: by `chunk_bytes` when given, else by measured defaults."""
    if chunk_bytes is not None:
        return max(1, min(rows, rows_in(chunk_bytes, vocabulary)))
    if device.type == "cpu":
        fit = rows_in(CPU_CHUNK_BYTES, vocabulary, MIN_CPU_CHUNK_ROWS)
        most = max(min(CHUNK_ROWS, fit), BLOCK_ELEMENTS // vocabulary)
        return equal_chunk(rows, most)
    return equal_chunk(rows, rows_in(CHUNK_BYTES, vocabulary, MIN_CHUNK_ROWS))


def worker_count(rows: int, width: int, device: torch.device) -> int:
    """How many threads take rows of their own: a divisor of torch's threads, 1 where a block holds all rows or on other devices."""
    if device.type != "cpu" or rows * width <= BLOCK_ELEMENTS:
        return 1
    threads = torch.get_num_threads()
    return max(count for count in range(1, min(MOST_WORKERS, rows) + 1) if threads % count == 0)


def block_rows(rows: int, width: int, device: torch.device, workers: int = 1) -> list[int]:
    """The rows of each block: as many as fit in a worker's part of the scratch, the last with the remainder."""
    elements = BLOCK_ELEMENTS // workers if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    size = max(1, min(rows, elements // width))
    return [size] * (rows // size) + [rows % size] * (rows % size > 0) if rows else []
