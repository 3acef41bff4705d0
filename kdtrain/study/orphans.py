"""Worker processes that do not outlive who started them, however that one ended."""

import os
import threading
import time

SECONDS = 2.0
"""How often a worker looks whether the process that it works for is still there."""


def end_with(process: int) -> None:
    """From now on end this process soon after the given one is gone."""
    threading.Thread(target=_watch, args=(process,), daemon=True).start()


def _watch(process: int) -> None:
    while True:
        # A number may be a zombie's or another program's by now; who becomes the parent of an orphan is sure.
        if os.getppid() != process:
            os._exit(1)
        time.sleep(SECONDS)
