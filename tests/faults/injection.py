"""Run a command in a fork and hurt it: SIGKILL before the n-th file operation, no space from the n-th write on, a signal.

A file operation is a call of the functions in `OPERATIONS` on a path below the watched folder. Each is counted before it
happens; the fork is killed, or refused the space, exactly there. Forks share the imports of the parent, so that a run of
a tiny command takes about a second.
"""

import builtins
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

OPERATIONS = (
    "open",
    "mkdir",
    "replace",
    "rename",
    "unlink",
    "remove",
    "rmdir",
    "fsync",
    "ftruncate",
    "link",
    "symlink",
)
"""Functions of `os` that change or open files."""
SECONDS = 120
"""A command of a scenario that takes longer hangs."""

Kind = Literal["none", "kill", "full"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """exit code; negative for a signal"""
    output: str
    """both streams"""
    operations: int
    """file operations that it came to"""

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL

    @property
    def traceback(self) -> bool:
        """Whether an exception reached the user."""
        return "Traceback (most recent call last)" in self.output


def run_hurt(
    command: Callable[[], int], watched: Path, log: Path, kind: Kind = "none", at: int = 0
) -> Outcome:
    """Run `command` in a fork.

    Args:
        command: what to run; its return value is the exit code.
        watched: operations on files below this folder count.
        log: a file outside of it for both streams.
        kind: what happens at operation `at`: nothing, SIGKILL, or "no space left" at every write from there on.
        at: number of the operation, from 1.
    """
    counted = log.with_suffix(".count")
    log.write_text("")
    counted.write_text("0")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            _redirect(log)
            _watch(watched, counted, kind, at)
            signal.alarm(SECONDS)
            code = command()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return Outcome(
        os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), int(counted.read_text() or 0)
    )


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), line_buffering=True)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True)  # noqa: SIM115


def _watch(watched: Path, counted: Path, kind: Kind, at: int) -> None:
    """Replace the functions of this process that touch files."""
    plain_open = os.open
    file = plain_open(counted, os.O_WRONLY)
    root = os.fsencode(watched.resolve())
    descriptors: set[int] = set()
    count = 0

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return path in descriptors
        return os.fsencode(os.path.abspath(os.fspath(path))).startswith(root)

    def happens(writes: bool) -> None:
        nonlocal count
        count += 1
        os.pwrite(file, b"%d" % count, 0)
        if kind == "kill" and count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and count >= at and writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wrapped(name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def operation(path: Any, *arguments: Any, **options: Any) -> Any:
            if not inside(path):
                return plain(path, *arguments, **options)
            writes = name in ("mkdir", "link", "symlink")
            if name == "open":
                flags = arguments[0] if arguments else options.get("flags", 0)
                writes = bool(flags & os.O_CREAT)
            happens(writes)
            result = plain(path, *arguments, **options)
            if name == "open":
                descriptors.add(result)
            return result

        return operation

    plain_file = builtins.open

    def open_file(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        changes = any(letter in mode for letter in "wax+")
        if isinstance(path, int) or not changes or not inside(path):
            return plain_file(path, mode, *arguments, **options)
        happens(writes=True)
        opened = plain_file(path, mode, *arguments, **options)
        descriptors.add(opened.fileno())
        return _Writes(opened, lambda: happens(writes=True)) if kind == "full" else opened

    for name in OPERATIONS:
        setattr(os, name, wrapped(name))
    builtins.open = open_file
    io.open = open_file


class _Writes:
    """A file whose writes may find the disk full."""

    def __init__(self, file: Any, before: Callable[[], None]) -> None:
        self._file, self._before = file, before

    def write(self, content: Any) -> Any:
        self._before()
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Writes":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)
