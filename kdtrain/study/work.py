"""Run the cells of a study, several side by side, each in a process that lives for many of them."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
import yaml

from kdtrain.console import progress, say
from kdtrain.engine.run_folder import RECIPE, has_ended, read_identity
from kdtrain.errors import KdtrainError
from kdtrain.study.orphans import end_with
from kdtrain.study.plan import Cell
from kdtrain.summary import Summary
from kdtrain.tasks.classification.splits import ClassificationData
from kdtrain.tasks.classification.task import Classification
from kdtrain.tasks.recipes import recipe_from_dict
from kdtrain.teacher_cache.store import read_manifest

PATIENCE = 20.0
"""Seconds in which the cells at work may save a checkpoint when the study is stopped."""


def run_cells(
    cells: list[Cell], data: dict[str, ClassificationData], workers: int | None, logs: Path
) -> None:
    """Run what is not finished yet. A cell that fails does not stop the others; its sentence comes at the end.

    Args:
        cells: all of the study, with every shared folder named.
        data: each task's data set.
        workers: processes; by default one a GPU, or one a core.
        logs: folder for what the runs have to say.

    Raises:
        KdtrainError: some cells failed, or a worker was killed.
    """
    fingerprints = {task: one.fingerprint() for task, one in data.items()}
    todo = [cell for cell in cells if not is_finished(cell, fingerprints[cell.task])]
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} runs are already done")
    if not todo:
        return
    # Runs over whole sequences take the longest and go first, so that no core is left waiting for the last of them.
    todo.sort(key=lambda cell: cell.recipe.method_name != "ckd")
    devices = torch.cuda.device_count()
    workers = min(workers or devices or os.cpu_count() or 1, len(todo))
    threads = max(1, torch.get_num_threads() // workers)
    say(f"{len(todo)} runs, {workers} side by side, {threads} threads each")
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    before, failed = os.environ.get("OMP_NUM_THREADS"), {}
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import torch
    try:
        arguments = (context.Value("i", 0), devices, str(logs), os.getpid(), list(sys.path))
        with (
            ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=arguments) as pool,
            progress(len(todo), "study", unit="runs") as bar,
        ):
            try:
                jobs = {pool.submit(_run_cell, cell.recipe.plain()): cell for cell in todo}
                for job in as_completed(jobs):
                    try:
                        say(job.result())
                    except KdtrainError as error:
                        failed[jobs[job].name] = str(error)
                        say(f"{jobs[job].name} failed: {error}")
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                end_workers()
                raise
    except BrokenProcessPool:
        raise KdtrainError(
            "a worker of the study was killed, most often for memory; run the same command again, with a smaller "
            "--workers if need be: finished runs stay"
        ) from None
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
    if failed:
        name, reason = next(iter(failed.items()))
        raise KdtrainError(f"{len(failed)} of {len(cells)} runs failed, the first, {name}: {reason}")


def end_workers() -> None:
    """Have the processes of this one end: at once, or after the step at work where they are training; then with force."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()


def is_finished(cell: Cell, fingerprint: str) -> bool:
    """Whether this very run, on this very data, has left its summary."""
    folder = Path(cell.recipe.output)
    if not (folder / RECIPE).exists() or not has_ended(folder):
        return False
    same = yaml.safe_load((folder / RECIPE).read_text()) == cell.recipe.plain()
    return same and Summary.load(folder).data["fingerprint"] == fingerprint and _same_teacher(cell)


def _same_teacher(cell: Cell) -> bool:
    """Whether the run learned from the teacher whose outputs the study holds now."""
    manifest = read_manifest(Classification(cell.recipe).cache_folder)
    if cell.recipe.teacher.path is None or manifest is None:
        return True
    return read_identity(Path(cell.recipe.output)).get("teacher") == manifest["teacher_weights"]


def _start(counter: "Synchronized[int]", devices: int, logs: str, parent: int, path: list[str]) -> None:
    """Set a worker up: its GPU, its log, and an end when the parent is gone."""
    sys.path[:] = path
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % devices)
    log = open(Path(logs) / f"worker-{number}.log", "a", buffering=1)  # noqa: SIM115, it lives as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the study tells its workers itself
    end_with(parent)


_shared: Any = None


def _run_cell(content: dict[str, Any]) -> str:
    """One run in a worker; what it made serves the next ones of the same task."""
    global _shared
    from kdtrain.run import run
    from kdtrain.tasks.base import SharedInputs

    recipe = recipe_from_dict(content)
    _shared = _shared or SharedInputs()
    summary = run(recipe, _shared)
    # The student is saved; what only served to go on from is not needed any more.
    for pattern in ("step-*", "best-*"):
        for folder in (Path(recipe.output) / "checkpoints").glob(pattern):
            shutil.rmtree(folder)
    return summary.line()
