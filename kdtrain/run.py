"""One run of any task, from recipe to student: prepare, train, measure, save."""

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtrain.console import say
from kdtrain.engine.accelerator import start_accelerator
from kdtrain.engine.checkpoint import Position
from kdtrain.engine.full_state import whole_state
from kdtrain.engine.processes import main_process_first
from kdtrain.engine.run_folder import claimed
from kdtrain.engine.trackers import tracked
from kdtrain.evaluation.measure import peak_memory
from kdtrain.evaluation.rows import measured_rows
from kdtrain.loop import train
from kdtrain.outputs import Batch
from kdtrain.plots import learning_curves
from kdtrain.recipe import RunRecipe
from kdtrain.summary import Summary, installed_versions
from kdtrain.tasks.base import SharedInputs, Task
from kdtrain.tasks.registry import task_of


def run(recipe: RunRecipe, shared: SharedInputs | None = None) -> Summary:
    """Train, measure and save one student; everything is written into `recipe.output`.

    A finished run of the same recipe, data and teacher is recognised and its summary returned; an unfinished one is
    resumed exactly where it stopped; the folder of another run is refused.

    Args:
        recipe: of any task.
        shared: data, teachers and tokens that earlier runs of this process made.

    Raises:
        KdtrainError: anything wrong with recipe, data, models or machine, as one sentence.
    """
    folder = Path(recipe.output)
    with closing(task_of(recipe)(recipe, shared)) as task:
        accelerator = start_accelerator(recipe.training, sharded=task.sharded, folder=folder)
        with main_process_first(accelerator):
            identity = task.identity()
        with claimed(folder, recipe, identity, accelerator) as finished:
            if not finished:
                train_and_save(task, folder, accelerator)
    summary = Summary.load(folder)
    if finished and accelerator.is_main_process:
        say(f"already done: {summary.line()}")
    return summary


def train_and_save(task: Task[Any], folder: Path, accelerator: Accelerator) -> None:
    """A run in its folder, which it holds alone."""
    recipe = task.recipe
    prepared = task.prepare(accelerator)
    objective = prepared.objective

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()

        def measure(batch: Batch) -> Tensor:
            return model(run=lambda: objective.measure(batch))

        values = measured_rows(measure, prepared.valid, accelerator, tokens=task.evaluation_tokens)
        return task.metrics(values, prepared.valid)

    with tracked(recipe, folder.name, accelerator):
        position = train(recipe, objective, prepared.train, evaluate, folder, accelerator)

    metrics = task.final(prepared, position, folder, accelerator)
    state = whole_state(objective)
    if accelerator.is_main_process:
        summary = Summary(
            name=folder.name,
            task=task.name,
            method=" + ".join(method.options.name for method in objective.plan),
            seed=recipe.seed,
            student=task.save(prepared, state, folder),
            valid=metrics["valid"],
            test=metrics.get("test"),
            teacher=task.describe_teacher(prepared),
            training=describe_training(position, accelerator),
            data=task.describe_data(prepared),
            versions=installed_versions(),
        )
        learning_curves({folder.name: folder}, folder / "plots" / "learning_curve.png")
        summary.save(folder)
        say(summary.line())
    accelerator.wait_for_everyone()


def describe_training(position: Position, accelerator: Accelerator) -> dict[str, Any]:
    """Steps, time, speed and memory of the training."""
    return {
        "steps": position.step,
        "best_step": position.best_step,
        "seconds": round(position.seconds, 2),
        "tokens": position.tokens,
        "tokens_per_second": round(position.tokens / position.seconds, 1),
        "peak_memory_bytes": peak_memory(accelerator.device),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
