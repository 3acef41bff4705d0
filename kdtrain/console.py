"""Progress for people: a bar on a terminal, plain lines in a file or a pipe."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

PLAIN_SECONDS = 30.0
"""How often, at most, a plain progress line is printed where there is no terminal."""


class Bar(Protocol):
    """What a running task may do with its bar."""

    def update(self, count: int = 1) -> None:
        """Move on by `count` units."""
        ...

    def note(self, text: str) -> None:
        """Show a short remark behind the bar."""
        ...


class _TerminalBar:
    def __init__(self, bar: "tqdm[Any]") -> None:
        self.bar = bar

    def update(self, count: int = 1) -> None:
        self.bar.update(count)

    def note(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)


class _PlainBar:
    def __init__(self, total: int, description: str, unit: str, initial: int) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, initial
        self.remark, self.printed = "", time.monotonic()
        self.begun, self.initial = self.printed, initial

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            pace = (self.printed - self.begun) / max(1, self.done - self.initial)
            left = human_seconds(pace * (self.total - self.done))
            say(
                f"{self.description}: {self.done}/{self.total} {self.unit}, {left} left {self.remark}".rstrip()
            )

    def note(self, text: str) -> None:
        self.remark = text


class _SilentBar:
    def update(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def progress(
    total: int, description: str, *, unit: str = "steps", initial: int = 0, show: bool = True
) -> Iterator[Bar]:
    """Give a bar for `total` units; `show=False` (other processes than the first) gives one that says nothing."""
    if not show:
        yield _SilentBar()
    elif not sys.stderr.isatty():
        yield _PlainBar(total, description, unit, initial)
    else:
        with tqdm(total=total, desc=description, unit=f" {unit}", initial=initial, dynamic_ncols=True) as bar:
            yield _TerminalBar(bar)


def human_seconds(seconds: float) -> str:
    """5025 as '1 h 24 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Print one line without tearing a bar that is on the screen.

    A log that cannot be written (its reader is gone, its disk is full) does not end what it reports: from then on it is dropped.
    """
    try:
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # ValueError: it is closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, it lives as long as the process
