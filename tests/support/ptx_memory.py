"""The memory of one program instance under the PTX interpreter, and who touched which byte since the last barrier.

Warps are ordered by barriers alone. So a program instance has one result for every order of its warps, and of their
lanes, if between two barriers no thread touches a byte that another one writes. That is looked for at every access. And a
row that is overwritten must have been read before: a load from where this launch has stored is an error of its own.
"""

from typing import Any

import numpy as np

Array = np.ndarray
NOBODY, SEVERAL = -1, -2


class OrderError(Exception):
    """Two threads whose accesses no barrier orders, a read of what was overwritten, or an address outside."""


class _Space:
    """A range of bytes, and by whom each was read and written since the last barrier."""

    def __init__(self, start: int, data: Array) -> None:
        self.start, self.data = start, data
        self.reader = np.full(len(data), NOBODY, np.int32)
        self.writer = np.full(len(data), NOBODY, np.int32)
        self.stored = np.zeros(len(data), bool)  # by this launch

    def barrier(self) -> None:
        self.reader.fill(NOBODY)
        self.writer.fill(NOBODY)


class Memory:
    """Global memory as (address, bytes), written in place, and shared memory, which starts as NaN."""

    def __init__(self, tensors: list[tuple[int, Array]], shared: int, first_lane_wins: bool) -> None:
        self.instruction: Any = None  # that runs now
        self._first_lane_wins = first_lane_wins
        self._spaces = {
            "global": [_Space(start, data) for start, data in tensors],
            "shared": [_Space(0, np.full(shared, 0xFF, np.uint8))],
        }

    def barrier(self) -> None:
        """All warps have arrived."""
        for spaces in self._spaces.values():
            for space in spaces:
                space.barrier()

    def load(self, space: str, addresses: Array, size: int, threads: Array, active: Array | None) -> Array:
        """(32, size) bytes; zeros in lanes that are not active."""
        found = np.zeros((len(addresses), size), np.uint8)
        here, places, owner = self._places(space, addresses, size, threads, active)
        if here is None:
            return found
        if space == "global" and here.stored[places].any():
            self._fail("reads what this program has overwritten")
        writer = here.writer[places]
        if ((writer != NOBODY) & (writer != owner)).any():
            self._fail("reads what another thread has written since the last barrier")
        before = here.reader[places]
        here.reader[places] = owner
        # Two lanes on one byte leave the later one; a byte that others read before belongs to several.
        shared = (here.reader[places] != owner) | ((before != NOBODY) & (before != owner))
        here.reader[places[shared]] = SEVERAL
        found[slice(None) if active is None else active] = here.data[places]
        return found

    def store(self, space: str, addresses: Array, data: Array, threads: Array, active: Array | None) -> None:
        """Write (32, columns) numbers."""
        raw = np.ascontiguousarray(data).view(np.uint8)
        here, places, owner = self._places(space, addresses, raw.shape[1], threads, active)
        if here is None:
            return
        raw = raw if active is None else raw[active]
        reader, writer = here.reader[places], here.writer[places]
        if ((reader != NOBODY) & (reader != owner)).any():
            self._fail("writes what another thread has read since the last barrier")
        same = here.data[places] == raw
        if ((writer != NOBODY) & (writer != owner) & ~same).any():
            self._fail("writes what another thread has written since the last barrier")
        # Of lanes that store to one place in one instruction one wins, and which one is open.
        ranks = slice(None, None, -1) if self._first_lane_wins else slice(None)
        here.data[places[ranks]] = raw[ranks]
        here.writer[places] = owner
        here.stored[places] = True

    def _places(
        self, space: str, addresses: Array, size: int, threads: Array, active: Array | None
    ) -> tuple[_Space | None, Array, Array]:
        """The space, the numbers of the bytes in it and their threads, (active lanes, size)."""
        if active is not None:
            addresses, threads = addresses[active], threads[active]
        if not len(addresses):
            return None, addresses, threads
        if (addresses % size).any():
            self._fail(f"is not aligned to {size} bytes")
        for here in self._spaces[space]:
            first = addresses - here.start
            if first.min() >= 0 and first.max() + size <= len(here.data):
                return (
                    here,
                    first[:, None] + np.arange(size),
                    np.broadcast_to(threads[:, None], (len(first), size)),
                )
        self._fail(f"reaches outside of the {space} memory that it was given")
        raise AssertionError

    def _fail(self, what: str) -> None:
        raise OrderError(f"{self.instruction.source}: `{self.instruction.text}` {what}")
