"""What a student costs to use: latency, throughput and memory, on the CPU and on a GPU where there is one.

Measured after all training, one model at a time in a process of its own, so that nothing else runs beside it.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdtrain.console import progress
from kdtrain.files import write_json
from kdtrain.recipe import ClassificationRecipe
from kdtrain.study.orphans import end_with
from kdtrain.study.plan import Cell
from kdtrain.tasks.recipes import recipe_from_dict

FILE = "costs.json"
BATCH = 32
ROWS = 200


@dataclass(frozen=True)
class Cost:
    """One model on one device, float32."""

    task: str
    student: str
    device: str
    threads: int
    latency_ms: float
    """median of one row at a time"""
    rows_per_second: float
    """in batches of 32 rows of similar length"""
    memory_bytes: int
    """what loading and using the model takes beyond the libraries: at its peak, in batches of 32"""


def measure_costs(cells: list[Cell], folder: Path) -> list[Cost]:
    """Measure every student once (the first finished run of each task and student), and each task's teacher."""
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if (Path(cell.recipe.output) / "student").is_dir():
            first.setdefault((cell.task, cell.student), cell)
    jobs = [(cell.task, cell.student, cell.recipe.plain(), False) for cell in first.values()]
    for task in dict.fromkeys(cell.task for cell in first.values()):
        recipe = next(cell.recipe for cell in first.values() if cell.task == task)
        if recipe.teacher.path is not None:
            jobs.append((task, "teacher", recipe.plain(), True))
    costs: list[Cost] = []
    # A fresh fork for each model, from a server that has loaded the libraries and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdtrain.tasks.classification.task"])
    with progress(len(jobs), "costs", unit="models") as bar:
        for job in jobs:
            with ProcessPoolExecutor(
                1,
                mp_context=context,
                initializer=_start,
                initargs=(list(sys.path), torch.get_num_threads(), os.getpid()),
            ) as pool:
                costs += pool.submit(_measure, *job).result()
            bar.update()
    write_json(folder / FILE, [asdict(cost) for cost in costs])
    return costs


def _start(path: list[str], threads: int, parent: int) -> None:
    sys.path[:] = path
    end_with(parent)
    torch.set_num_threads(threads)


def _measure(task: str, student: str, content: dict[str, Any], teacher: bool) -> list[Cost]:
    from kdtrain.models.loading import load_classifier, load_tokenizer
    from kdtrain.tasks.classification.metrics import latency_ms
    from kdtrain.tasks.classification.pairs import tokenize_split
    from kdtrain.tasks.classification.task import Classification

    recipe = recipe_from_dict(content)
    assert isinstance(recipe, ClassificationRecipe)
    run = Classification(recipe)
    data = run.data
    index = torch.linspace(0, len(data.test) - 1, min(ROWS, len(data.test))).long().tolist()
    split = data.test.select(index)
    costs = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        before = _reset_peak(device)
        if teacher:
            loaded = run.teacher
            assert loaded is not None
            model, rows = (
                loaded.model,
                tokenize_split(split, loaded.tokenizer, loaded.max_length, data.focus, loaded.insert),
            )
        else:
            folder = str(Path(recipe.output) / "student")
            model = load_classifier(folder, "student")
            tokenizer = load_tokenizer(folder, "student")
            limit = recipe.student.max_length
            rows = tokenize_split(split, tokenizer, limit, data.focus, run.inserted(tokenizer))
        torch.nn.Module.to(model.eval(), device)
        speed = _rows_per_second(model, rows, device)
        peak = _peak(device) - before
        costs.append(
            Cost(task, student, device, torch.get_num_threads(), latency_ms(model, rows), speed, max(0, peak))
        )
    return costs


@torch.inference_mode()
def _rows_per_second(model: Any, rows: Any, device: str) -> float:
    import time

    order = torch.argsort(rows.lengths, descending=True)
    batches = [tuple(part.to(device) for part in rows.batch(index)) for index in order.split(BATCH)]
    best = float("inf")
    for _ in range(2):  # the first round warms up
        start = time.perf_counter()
        for input_ids, mask in batches:
            model(input_ids=input_ids, attention_mask=mask)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return len(rows) / best


def _reset_peak(device: str) -> int:
    """Bytes held now; from here on the peak is counted anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        # Linux: the high-water mark of this process starts anew.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak of the whole life of this process
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
