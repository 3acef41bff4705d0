"""Runs a case: starts one process a contender, lets them take turns, and gathers what they measured."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.operation import AnyCase, Operation
from benchmarks.registry import operation_of

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_ROUNDS = 3


def checkout_first() -> dict[str, str]:
    """The environment of a process that measures this checkout, whatever else is installed, or nothing."""
    path = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keep `count` cores busy meanwhile, as other work on the machine does."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


@dataclass
class Row:
    """What one contender did in one case."""

    contender: str
    seconds: list[float] = field(default_factory=list)  # one a round, in the order of the rounds
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    cannot_run: str | None = None


class Worker:
    """A contender's process and the pipe to it."""

    def __init__(self, contender: str, case: AnyCase, folder: Path) -> None:
        self.row = Row(contender)
        truth = str(folder / "truth.pt")
        job = {"contender": contender, "family": case.family, "case": case.as_dict(), "truth": truth}
        # A file: a pipe that nobody reads fills up and blocks.
        self._complaints = folder / f"{contender}.stderr"
        with self._complaints.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", json.dumps(job)],
                cwd=ROOT,
                env=checkout_first(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def answer(self) -> dict[str, Any]:
        """The next answer; a reason not to run is kept in the row, and a process that died gives its last words."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            last_line = self._complaints.read_text().strip().rpartition("\n")[2]
            found = {"cannot_run": f"stopped with status {status}: {last_line}"[:200]}
        else:
            found = json.loads(line)
        if "cannot_run" in found:
            self.row.cannot_run = found["cannot_run"]
        return found

    def order(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone, and its answer says why
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        return self.answer()

    def dismiss(self) -> None:
        """No more orders; it ends by itself."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        assert self._process.stdout is not None
        self.dismiss()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def run_case(
    case: AnyCase,
    contenders: list[str],
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    *,
    errors: bool = True,
) -> list[Row]:
    """Measure one case: at most `rounds` rounds, stopping after `seconds` when MINIMUM_ROUNDS are done.

    Warm-up runs one contender after the other. Then every round times each contender once, in an order drawn
    anew each time, so that a slow spell of the machine falls on all of them. Memory and error come last, untimed;
    without `errors` nothing is computed in fp64.
    """
    end = time.monotonic() + seconds
    operation: Operation = operation_of(case)
    errors = errors and operation.truth is not None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workers: list[Worker] = []
        try:
            truth = (
                Worker("truth", case, folder) if errors and set(contenders) - operation.yardsticks else None
            )
            workers += [Worker(name, case, folder) for name in contenders]  # they start while that computes
            if truth is not None:
                say("fp64 truth")
                found = truth.answer()
                truth.close()
                if "cannot_run" in found:
                    raise RuntimeError(f"The fp64 truth of '{case.name}' failed: {found['cannot_run']}")
            for worker in workers:
                say(f"warm-up of {worker.row.contender}")
                if "ready" in worker.answer():
                    worker.order("warm up")
            running = [worker for worker in workers if worker.row.cannot_run is None]
            shuffled = random.Random(0)
            for number in range(rounds):
                if number >= MINIMUM_ROUNDS and time.monotonic() > end:
                    break
                say(f"round {number + 1} of at most {rounds}")
                for worker in shuffled.sample(running, len(running)):
                    found = worker.order("time")
                    if "seconds" in found:
                        worker.row.seconds.append(found["seconds"])
                    else:
                        running.remove(worker)
            say("memory and error")
            for worker in running:
                worker.row.peak_bytes = worker.order("memory").get("peak_bytes")
                if errors and worker.row.cannot_run is None:
                    worker.row.errors = worker.order("error")
        finally:
            for worker in workers:
                worker.dismiss()  # they end side by side
            for worker in workers:
                worker.close()
    return [worker.row for worker in workers]
