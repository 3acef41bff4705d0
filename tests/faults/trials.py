"""One trial: hurt a command once, run it again, and compare the results with those of an undisturbed run.

Whatever happened, the second run must end with the same bytes, or refuse with one sentence that names a file or a fix.
Anything else is a failure: other bytes ("silent"), a traceback, a hang, leftovers.
"""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.faults.injection import Outcome, run_hurt
from tests.faults.scenarios import Scenario, temporaries

Fault = Literal["kill", "full disk", "flip", "truncate", "remove", "empty"]
Verdict = Literal["same bytes", "refused", "silent", "traceback", "hang", "leftovers"]
SURVIVED: tuple[Verdict, ...] = ("same bytes", "refused")
REFUSED = 2


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a scenario."""

    scenario: Scenario
    shared: Path
    operations: int
    result: dict[str, str]
    files: tuple[str, ...]
    """files below the output of a run that was stopped half-way, and of a finished one"""
    halfway: int
    """operation before which the run was stopped for the damage trials"""


@dataclass
class Table:
    """Verdicts by fault."""

    counts: Counter[tuple[Fault, Verdict]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, fault: Fault, verdict: Verdict, text: str) -> None:
        """One more trial."""
        self.counts[fault, verdict] += 1
        if verdict not in SURVIVED:
            self.failures.append(text)


def reference(scenario: Scenario, shared: Path, folder: Path) -> Reference:
    """Run a scenario undisturbed, and once more up to half of its file operations."""
    whole = _start(scenario, shared, folder / "whole")
    done = run_hurt(scenario.command(whole), whole / "output", folder / "whole.log")
    assert done.code == 0, done.output[-3000:]
    half = _start(scenario, shared, folder / "half")
    at = max(1, done.operations * 3 // 5)
    run_hurt(scenario.command(half), half / "output", folder / "half.log", "kill", at)
    names = {
        str(path.relative_to(root / "output"))
        for root in (whole, half)
        for path in (root / "output").rglob("*")
        if path.is_file()
    }
    result = scenario.result(whole)
    assert result, f"{scenario.name} made no results"
    return Reference(scenario, shared, done.operations, result, tuple(sorted(names)), at)


def trial(made: Reference, folder: Path, fault: Fault, at: int | str, seed: int) -> tuple[Verdict, str]:
    """Hurt a run and judge the one after it.

    Args:
        made: the undisturbed run.
        folder: an empty folder for this trial.
        at: the operation to hurt at, or the file to damage.
        seed: place of the flipped bit, and whether the run is finished before the damage.

    Returns:
        The verdict, and a text that says how to see it again.
    """
    scenario, generator = made.scenario, random.Random(seed)
    root = _start(scenario, made.shared, folder / "run")
    output, log, command = root / "output", folder / "log", scenario.command(root)
    where = f"{scenario.name}: {fault} at {at}, seed {seed}"
    if fault in ("kill", "full disk"):
        first = run_hurt(command, output, log, "kill" if fault == "kill" else "full", int(at))
        if fault == "full disk" and (first.traceback or first.code not in (0, 1, 2)):
            return ("traceback" if first.traceback else "hang"), f"{where}\n{first.output[-2000:]}"
    else:
        finished = generator.random() < 0.5
        run_hurt(command, output, log, "none" if finished else "kill", 0 if finished else made.halfway)
        path = output / str(at)
        if not path.is_file() or not damage(path, fault, generator):
            return "same bytes", where
    second = run_hurt(scenario.command(root, second=True), output, log)
    return judge(made, root, second, where)


def judge(made: Reference, root: Path, second: Outcome, where: str) -> tuple[Verdict, str]:
    """What the run after the fault came to."""
    text = f"{where}\n{second.output[-2000:]}"
    if second.traceback:
        return "traceback", text
    if second.code < 0:
        return "hang", text
    if second.code == REFUSED:
        return "refused", text
    if made.scenario.result(root) != made.result or second.code != 0:
        return "silent", text
    if temporaries(root):
        return "leftovers", f"{text}\n{[str(path) for path in temporaries(root)]}"
    return "same bytes", text


def damage(path: Path, fault: Fault, generator: random.Random) -> bool:
    """Damage a file; False where there is nothing to damage."""
    content = bytearray(path.read_bytes())
    if not content and fault != "remove":
        return False
    if fault == "remove":
        path.unlink()
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "truncate":
        path.write_bytes(content[: generator.randrange(len(content))])
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    return True


def all_trials(made: Reference) -> Iterator[tuple[Fault, int | str]]:
    """Every operation to kill at, every write to refuse, every file to damage in every way."""
    for at in range(1, made.operations + 1):
        yield "kill", at
        yield "full disk", at
    for name in made.files:
        for fault in ("flip", "truncate", "remove", "empty"):
            yield fault, name


def _start(scenario: Scenario, shared: Path, root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    scenario.inputs(root, shared)
    return root
