"""Programs in processes of their own that do not import everything again.

`python -m` spends seconds on imports before the program's first line. Here one process does that once, and each program
is a fork of it: a real process with its own id, signals, environment and exit code, which nothing the tests did before
can have touched. Tests that use it share the xdist group "programs", so that a parallel run has one such process.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

START_METHOD = "forkserver"
_forks = multiprocessing.get_context(START_METHOD)
_forks.set_forkserver_preload(["tests.support.preloaded"])


class Program:
    """`python -m module words`, begun. Of `subprocess.Popen` it has what tests use."""

    def __init__(self, words: list[str], environment: dict[str, str] | None = None, typed: str = "") -> None:
        self._words = words
        folder = tempfile.mkdtemp(prefix="kdkernels-program-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._said = [Path(folder) / name for name in ("output", "errors")]
        for path in self._said:
            path.touch()
        keyboard = Path(folder) / "keyboard"
        keyboard.write_text(typed)
        whole = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
        self._process = _forks.Process(target=_run, args=(words, whole, *map(str, (keyboard, *self._said))))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it; None while the program runs."""
        return self._process.exitcode

    def communicate(self, timeout: float = 200.0) -> tuple[str, str]:
        """What it wrote to both streams, once it has ended; one that takes longer is killed and fails the test."""
        self._process.join(timeout)
        output, errors = (path.read_text() for path in self._said)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(" ".join(self._words), timeout, output, errors)
        return output, errors

    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._said[1].read_text()

    def kill(self) -> int | None:
        """kill -9, and the exit code."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()
        return self.returncode


def _run(words: list[str], environment: dict[str, str], keyboard: str, output: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background ignores it
    with open(keyboard, "rb") as file:
        os.dup2(file.fileno(), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    for number, path in ((1, output), (2, errors)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    sys.argv = words.copy()
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def torchrun(words: list[str], environment: dict[str, str] | None = None, processes: int = 2) -> Program:
    """`torchrun -m module words` on the CPU, its workers forks as well."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--start-method=fork"]
    script = str(Path(__file__).with_name("as_module.py"))
    return Program([*launch, "--run-path", script, *words], environment)
