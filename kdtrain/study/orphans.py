"""Worker processes that do not outlive who started them, however that one ended."""

import os
import threading
import time

SECONDS = 2.0
"""How often a worker looks whether the process that it works for is still there."""


def end_with(process: int) -> None:
    """From now on end this process soon after the given one, or its parent, is gone."""
    threading.Thread(target=_watch, args=(process, os.getppid()), daemon=True).start()


def _watch(process: int, parent: int) -> None:
    # The number of a process may be a zombie's or another program's by now; an orphan gets another parent at once.
    while os.getppid() == parent and _exists(process):
        time.sleep(SECONDS)
    os._exit(1)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing, only asks
    except ProcessLookupError:
        return False
    return True
