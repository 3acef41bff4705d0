"""Whoever starts a run can stop it: nothing is lost but a step, nobody is left behind, and the right process is named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdtrain.engine.checkpoint import steps_of
from kdtrain.evaluation.metrics import keep_lines, read_metrics
from kdtrain.recipe import ClassificationRecipe, save_recipe
from kdtrain.run import run
from tests.support.commands import Program, torchrun

ROOT = Path(__file__).resolve().parents[2]


def wait_for(what: Callable[[], object], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def long(recipe: ClassificationRecipe, folder: Path, **changes: object) -> ClassificationRecipe:
    """Sixty steps with one evaluation, at the end."""
    training = recipe.training.replaced(max_steps=60, eval_steps=60, logging_steps=1, **changes)
    return recipe.replaced(training=training, output=str(folder))


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_a_checkpoint_before_any_evaluation(
    recipe: ClassificationRecipe, tmp_path: Path, number: signal.Signals
) -> None:
    stopped, whole = long(recipe, tmp_path / "stopped"), long(recipe, tmp_path / "whole")
    save_recipe(stopped, tmp_path / "recipe.yaml")
    process = Program(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    wait_for(lambda: len(read_metrics(tmp_path / "stopped")) >= 3)
    os.kill(process.pid, number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    told = re.search(
        rf"kdtrain: stopped by {number.name} at step (\d+) of 60; the same command resumes at step (\d+) ",
        errors,
    )
    assert told is not None and told[1] == told[2], errors
    assert steps_of(tmp_path / "stopped" / "checkpoints") == [int(told[1])]
    logged = read_metrics(tmp_path / "stopped")[-1]["step"]
    assert logged == int(told[1]) < 60, "no step is lost"
    run(stopped)
    run(whole)
    assert (tmp_path / "stopped/student/model.safetensors").read_bytes() == (
        tmp_path / "whole/student/model.safetensors"
    ).read_bytes()


TWICE = """
import signal, sys, time
from accelerate import Accelerator
from kdtrain.engine.interrupts import StopSignals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
with StopSignals(Accelerator(cpu=True)) as signals:
    print("ready", flush=True)
    while not signals.agreed():
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGINT)  # the terminal's and torchrun's of one Ctrl-C
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    assert "SIGINT: a checkpoint is saved after this step; a second signal ends at once" in errors


# ---- several processes


@pytest.mark.xdist_group("programs")
def test_a_signal_to_one_process_stops_all_of_them_at_one_step(
    recipe: ClassificationRecipe, tmp_path: Path
) -> None:
    save_recipe(long(recipe, tmp_path / "run"), tmp_path / "recipe.yaml")
    process = torchrun(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 3)
    os.kill(worker(process.pid, 1), signal.SIGTERM)
    _, errors = process.communicate()
    told = re.findall(
        r"kdtrain: stopped by SIGTERM at step (\d+) of 60; the same command resumes at step \1 ", errors
    )
    assert len(told) == 1 and "ended in the middle" not in errors, errors[-3000:]
    again = torchrun(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    _, errors = again.communicate()
    assert again.returncode == 0 and f"resumed at step {told[0]} of 60" in errors, errors[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["training"]["processes"] == 2


@pytest.mark.xdist_group("programs")
def test_a_stuck_process_is_named_within_the_time_of_the_recipe(
    recipe: ClassificationRecipe, tmp_path: Path
) -> None:
    save_recipe(long(recipe, tmp_path / "run", ddp_timeout=6), tmp_path / "recipe.yaml")
    process = torchrun(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 3)
    stuck = worker(process.pid, 1)
    os.kill(stuck, signal.SIGSTOP)
    started = time.monotonic()
    words = "process 1 of 2 has not answered for 6 s (training.ddp_timeout): it hangs or was stopped"
    try:
        wait_for(lambda: words in process.errors(), 60.0)
        assert time.monotonic() - started < 45
    finally:
        os.kill(stuck, signal.SIGKILL)
        process.communicate()


def worker(launcher: int, rank: int) -> int:
    """The process of one rank below torchrun."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            content = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == launcher and f"LOCAL_RANK={rank}".encode() in content:
            return int(path.parent.name)
    return _worker_by_order(launcher, rank)


def _worker_by_order(launcher: int, rank: int) -> int:
    """Forks keep the environment they were started with; torchrun starts its workers in the order of their ranks."""
    children = sorted(
        int(number)
        for path in Path(f"/proc/{launcher}/task").glob("*/children")
        for number in path.read_text().split()
    )
    return children[-2:][rank]


# ---- studies and their workers


ORPHAN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", f"import time; from kdtrain.study.orphans import end_with; end_with({os.getpid()}); print('up', flush=True); time.sleep(120)"])
print(child.pid, flush=True)
time.sleep(120)
"""


def test_a_worker_ends_with_a_parent_that_nobody_reaps() -> None:
    command = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "up\n"
        parent.send_signal(signal.SIGKILL)  # and not waited for: it stays as a zombie
        wait_for(lambda: not _is_alive(child), 10.0)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


# ---- logs


@pytest.mark.parametrize("kind", ["reader is gone", "disk is full"])
def test_a_log_that_cannot_be_written_ends_nothing(kind: str) -> None:
    code = "import sys\nfrom kdtrain.console import say\n[say('x' * 999) for _ in range(99)]\nprint('done')"
    if kind == "disk is full":
        with open("/dev/full", "w") as log:
            ended = subprocess.run(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
            )
    else:
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, text=True, cwd=ROOT
        )
        os.close(writing)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_lines_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo}\n[3]\n{"step": 3, "loss": 1.0}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_the_summary_does_not_need_the_log(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    """The last line of metrics.jsonl is lost in a crash after the last checkpoint."""
    short = recipe.replaced(training=recipe.training.replaced(max_steps=4), output=str(tmp_path / "run"))
    first = run(short)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "checksums.json").unlink()
    assert run(short).test == first.test
