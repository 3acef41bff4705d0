"""The training loop: one function, top to bottom, for every task and method."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from kdtrain.console import event, progress, say
from kdtrain.data.tokens import epoch_batches
from kdtrain.engine.checkpoint import Position, load_checkpoint, read_best, save_best, save_checkpoint
from kdtrain.engine.failures import failures_told
from kdtrain.engine.full_state import joined, load_state, whole_state
from kdtrain.engine.gradients import give, gradient_sync, taken
from kdtrain.engine.interrupts import StopSignals, stopped
from kdtrain.engine.layers import set_up_layers
from kdtrain.engine.means import RunningMeans
from kdtrain.engine.random import own_part, random_state, set_random_state
from kdtrain.engine.run_folder import recipe_hash
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.measure import peak_memory
from kdtrain.evaluation.metrics import keep_lines
from kdtrain.files import append_line
from kdtrain.methods.base import Step
from kdtrain.objective import Objective
from kdtrain.recipe import RunRecipe, TrainingSection
from kdtrain.tasks.base import TrainingData, WaitingData

SMALLER_IS_BETTER = ("loss", "divergence", "perplexity")


def train(
    recipe: RunRecipe,
    model: Objective,
    data: TrainingData,
    evaluate: Callable[[nn.Module], dict[str, float]],
    folder: Path,
    accelerator: Accelerator,
) -> Position:
    """Train `model` as the recipe says and leave it with its best weights, whatever the task.

    Writes `metrics.jsonl` and `checkpoints/` into `folder`; where those hold an unfinished run, resumes exactly as if
    it had never stopped.

    Args:
        evaluate: metrics of the model as accelerate wrapped it; every process takes part and gets the same.

    Returns:
        The last position, which names the best step.
    """
    # The signals come first: torchrun sends SIGTERM as soon as one process is gone, and the others tell which one.
    with StopSignals(accelerator) as signals, failures_told(recipe.training, folder, accelerator):
        return _train(recipe, model, data, evaluate, folder, accelerator, signals)


def _train(
    recipe: RunRecipe,
    model: Objective,
    data: TrainingData,
    evaluate: Callable[[nn.Module], dict[str, float]],
    folder: Path,
    accelerator: Accelerator,
    signals: StopSignals,
) -> Position:
    # ---- set up
    options = recipe.training
    device, main = accelerator.device, accelerator.is_main_process
    steps_per_epoch = math.ceil(len(data.lengths) / options.batch_size)
    total_steps = options.max_steps or math.ceil(options.num_train_epochs * steps_per_epoch)
    evaluate_every = options.eval_steps or steps_per_epoch
    save_every = options.save_steps or evaluate_every
    splits = options.gradient_accumulation_steps * accelerator.num_processes

    plain = model.to(device)
    set_up_layers(plain.student, options)
    optimizer: Any = torch.optim.AdamW(parameter_groups(plain, options), lr=options.learning_rate, fused=True)
    scheduler = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        # Its steps begin at a rate of 0: at least one has to be left that learns.
        num_warmup_steps=min(round(options.warmup_ratio * total_steps), total_steps - 1),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=options.lr_scheduler_kwargs,
    )
    # The scheduler stays outside of prepare(), which would step it once per process.
    wrapped, optimizer = accelerator.prepare(plain, optimizer)
    parameters = list(plain.parameters())
    groups = plain.gradient_groups
    if len(groups) > 1 and options.precision == "fp16":
        raise KdtrainError(
            "a method that combines gradients cannot compare those that training.precision fp16 scales; use bf16 or fp32"
        )

    checkpoints, metrics_path = folder / "checkpoints", folder / "metrics.jsonl"
    torch.manual_seed(recipe.seed * 1000 + accelerator.process_index)
    position, running = Position(), RunningMeans(device)
    run = recipe_hash(recipe)
    tell = say if main else lambda text: None
    resumed = load_checkpoint(
        checkpoints, plain, optimizer, scheduler, accelerator.scaler, run=run, tell=tell
    )
    if resumed is not None:
        position, tensors = resumed
        running = RunningMeans(device, own_part(tensors, accelerator))
        set_rates(optimizer, scheduler)
    if main:
        keep_lines(metrics_path, position.step)
        if position.step:
            say(f"resumed at step {position.step} of {total_steps}")
    epoch, plan = -1, []
    saved = position.step
    window = replace(position)
    wrapped.train()

    with progress(total_steps, folder.name, initial=position.step, show=main) as bar:
        while True:
            stop = signals.agreed()
            step = Step(position.step, total_steps, position.step / steps_per_epoch, recipe.seed)
            last = step.number == total_steps or position.waited == options.early_stopping_patience

            # ---- evaluate
            due = step.number > position.evaluated_step and (step.number % evaluate_every == 0 or last)
            if due and not stop:
                metrics = evaluate(wrapped)
                check_finite(metrics["loss"], step.number, options)  # no line may have been logged yet
                value = metrics[options.metric_for_best_model] * (
                    -1 if options.metric_for_best_model in SMALLER_IS_BETTER else 1
                )
                position.waited, position.evaluated_step = position.waited + 1, step.number
                if position.best_value is None or value > position.best_value:
                    position.best_step, position.best_value, position.waited = step.number, value, 0
                    position.best_metrics = metrics
                    state = whole_state(plain)
                    if main:
                        save_best(checkpoints, step.number, state)
                shown = prefixed("valid", metrics)
                accelerator.log(shown, step=step.number)
                if main:
                    append_line(metrics_path, json.dumps({"step": step.number, **shown}))
                    event(folder.name, f"{step.number}/{total_steps}", metrics)
                plain.after_evaluate(step, metrics)
                last = last or position.waited == options.early_stopping_patience
                wrapped.train()

            # ---- save
            if step.number > saved and (step.number % save_every == 0 or last or stop):
                assert running.sums is not None
                tensors = {"random": random_state(device), "sums": running.sums}
                tensors = {name: accelerator.gather(value[None]).cpu() for name, value in tensors.items()}  # type: ignore[union-attr]
                state, optimizer_state = whole_state(plain), whole_state(optimizer)
                if main:
                    save_checkpoint(
                        checkpoints,
                        position,
                        state,
                        optimizer_state,
                        scheduler,
                        accelerator.scaler,
                        tensors,
                        run,
                        options.save_total_limit,
                    )
                del state, optimizer_state
                accelerator.wait_for_everyone()
                saved = step.number

            if stop:
                raise stopped(stop, step.number, total_steps, folder, accelerator)
            if last:
                break

            # ---- step
            started = time.perf_counter()
            if step.number // steps_per_epoch != epoch:
                epoch = step.number // steps_per_epoch
                plan = epoch_batches(
                    data.lengths,
                    options.batch_size,
                    recipe.seed,
                    epoch,
                    group_by_length=options.group_by_length,
                )
            rows = plan[step.number % steps_per_epoch]
            batch = plain.prepare_step(wrapped, step, rows, data, accelerator, splits)
            draws = random_state(device) if len(groups) > 1 else None
            running.begin_step()
            gradients = []
            for group in groups:
                if gradients and draws is not None:
                    set_random_state(draws)  # the groups are parts of one loss, under one dropout
                for number, (micro_batch, scale) in enumerate(batch, start=1):
                    with gradient_sync(accelerator, wrapped, last=number == len(batch), groups=len(groups)):
                        loss, values = wrapped(micro_batch, batch.divisor, group)
                        accelerator.backward(loss * scale)
                    running.add(loss, values, scale=scale / accelerator.num_processes, divisor=batch.divisor)
                if len(groups) > 1:
                    gradients.append(taken(parameters, accelerator))
            if gradients:
                give(parameters, plain.combine(step, gradients, running.step_values(accelerator)))
            norm = accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
            running.end_step(None if norm is None else joined(norm), plain.logged(), accelerator)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            plain.after_step(step, lambda: running.step_values(accelerator))
            position.step += 1
            position.tokens += int(data.lengths[batch.rows].sum())
            means: dict[str, float] = {}
            if position.step % options.logging_steps == 0:  # the only place that waits for the device
                means = running.means(accelerator, options.logging_steps)
            position.seconds += time.perf_counter() - started
            bar.update()

            # ---- log
            if means:
                seconds = position.seconds - window.seconds
                loss, norm = means.pop("loss"), means.pop("grad_norm")
                check_finite(loss, position.step, options)
                line = {
                    "step": position.step,
                    "epoch": round(position.step / steps_per_epoch, 4),
                    "loss": loss,
                    **means,
                    "grad_norm": norm,
                    "lr": scheduler.get_last_lr()[0],
                    "tokens": position.tokens,
                    "tokens_per_second": round((position.tokens - window.tokens) / seconds, 1),
                    "step_seconds": round(seconds / (position.step - window.step), 5),
                    "peak_memory_bytes": peak_memory(device),
                }
                if isinstance(data, WaitingData):
                    line["teacher_wait_share"] = round(data.waited() / seconds, 4)
                accelerator.log(line, step=position.step)
                if main:
                    append_line(metrics_path, json.dumps(line))
                bar.note(loss=loss, tokens_per_second=line["tokens_per_second"])
                window = replace(position)

    # ---- the best weights stay
    accelerator.wait_for_everyone()
    load_state(plain, read_best(checkpoints, position.best_step))
    return position


def set_rates(optimizer: Any, scheduler: Any) -> None:
    """The learning rates of the next step by the schedule of this run, which may be longer than the one that was saved."""
    for group, base, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(scheduler.last_epoch)


def check_finite(loss: float, step: int, options: TrainingSection) -> None:
    """Stop a run that has diverged."""
    if not math.isfinite(loss):
        raise KdtrainError(
            f"the loss is {loss} at step {step}; lower training.learning_rate "
            f"(now {options.learning_rate}) or training.max_grad_norm (now {options.max_grad_norm})"
        )


def parameter_groups(model: torch.nn.Module, options: TrainingSection) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """{"accuracy": 0.5} as {"valid/accuracy": 0.5}."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
