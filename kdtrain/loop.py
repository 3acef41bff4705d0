"""The training loop: one function, top to bottom."""

import json
import math
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from kdtrain.console import progress, say
from kdtrain.data.tokens import length_grouped_batches
from kdtrain.engine.checkpoint import Position, load_checkpoint, read_best, save_best, save_checkpoint
from kdtrain.engine.failures import tells_failures
from kdtrain.engine.full_state import joined, load_state, whole_state
from kdtrain.engine.run_folder import recipe_hash
from kdtrain.engine.zero import piece_of_batch, prepared
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import keep_lines
from kdtrain.files import append_line
from kdtrain.recipe import TrainingRecipe
from kdtrain.tasks.base import Evaluate, Objective, RunRecipe, TrainingData

SMALLER_IS_BETTER = ("loss", "divergence")


@tells_failures
def train(
    recipe: RunRecipe,
    model: Objective,
    data: TrainingData,
    evaluate: Evaluate,
    folder: Path,
    accelerator: Accelerator,
) -> Position:
    """Train `model` as the recipe says and leave it with its best weights, whatever the task.

    Writes `metrics.jsonl` and `checkpoints/` into `folder`; where those hold an unfinished run, goes on from there
    exactly as if it had never stopped. Gives the last position, which names the best step.
    """
    # ---- set up
    options = recipe.training
    device, main = accelerator.device, accelerator.is_main_process
    steps_per_epoch = math.ceil(len(data.lengths) / options.batch_size)
    total_steps = min(options.max_steps or options.epochs * steps_per_epoch, options.epochs * steps_per_epoch)
    evaluate_every = options.evaluate_every or steps_per_epoch
    cuts = options.accumulation * accelerator.num_processes
    names = model.names

    plain = model.to(device)
    optimizer: Any = torch.optim.AdamW(parameter_groups(plain, options), lr=options.learning_rate, fused=True)
    scheduler = get_scheduler(
        options.schedule,
        optimizer,
        # Its steps begin at a rate of 0: at least one has to be left that learns.
        num_warmup_steps=min(round(options.warmup * total_steps), total_steps - 1),
        num_training_steps=total_steps,
    )
    # The scheduler stays outside of prepare(), which would step it once per process.
    model, optimizer = prepared(accelerator, plain, optimizer, options)
    parameters = list(plain.parameters())

    checkpoints, metrics_path = folder / "checkpoints", folder / "metrics.jsonl"
    torch.manual_seed(recipe.seed * 1000 + accelerator.process_index)
    position, sums = Position(), torch.zeros(len(names) + 2, device=device)
    run = recipe_hash(recipe)
    tell = say if main else lambda text: None
    resumed = load_checkpoint(
        checkpoints, plain, optimizer, scheduler, accelerator.scaler, run=run, tell=tell
    )
    if resumed is not None:
        position, tensors = resumed
        sums = own_part(tensors, accelerator)
    if main:
        keep_lines(metrics_path, position.step)
        if position.step:
            say(f"resumed at step {position.step} of {total_steps}")
    epoch, plan, means = -1, [], []
    evaluated = saved = position.step
    window = replace(position)
    model.train()

    with progress(total_steps, folder.name, initial=position.step, show=main) as bar:
        while True:
            step = position.step

            # ---- evaluate
            if step > evaluated and (step % evaluate_every == 0 or step == total_steps):
                metrics = evaluate(model, accelerator)
                check_finite(metrics["loss"], step, options)  # no line may have been logged yet
                value = metrics[options.best_metric] * (-1 if options.best_metric in SMALLER_IS_BETTER else 1)
                if position.best_value is None or value > position.best_value:
                    position.best_step, position.best_value = step, value
                    state = whole_state(plain)
                    if main:
                        save_best(checkpoints, step, state)
                if main:
                    append_line(metrics_path, json.dumps({"step": step, **prefixed("valid", metrics)}))
                    say(f"{folder.name}: step {step}/{total_steps} {describe(metrics)}")
                model.train()
                evaluated = step

            # ---- save
            if step > saved and evaluated == step:
                tensors = {"random": random_state(device), "sums": sums}
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
                    )
                del state, optimizer_state
                accelerator.wait_for_everyone()
                saved = step

            if step == total_steps:
                break

            # ---- step
            started = time.perf_counter()
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                plan = length_grouped_batches(data.lengths, options.batch_size, recipe.seed, epoch)
            batch_rows = plan[step % steps_per_epoch]
            mine = batch_rows.tensor_split(cuts)[accelerator.process_index :: accelerator.num_processes]
            # Every process takes part in every exchange: an empty piece runs one row and counts it as nothing.
            # DDP averages, the loss is a sum.
            shares = [accelerator.num_processes if len(piece) else 0 for piece in mine]
            pieces = (data.batch(piece if len(piece) else batch_rows[:1], device) for piece in mine)
            plain.start_step(step, total_steps)
            pieces, divisor = plain.look_ahead(pieces, mine, batch_rows, data.count(batch_rows), accelerator)
            for number, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
                with piece_of_batch(accelerator, model, last=number == len(mine) - 1):
                    loss, terms = model(piece, divisor)
                    accelerator.backward(loss * share)
                sums[:-2] += terms * (share / (divisor * accelerator.num_processes))
                sums[-2] += loss.detach() * (share / accelerator.num_processes)
            norm = accelerator.clip_grad_norm_(parameters, options.clip_norm)
            sums[-1] += 0.0 if norm is None else joined(norm)  # None under DeepSpeed, which clips for itself
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            position.step += 1
            position.tokens += int(data.lengths[batch_rows].sum())
            log_now = position.step % options.log_every == 0
            if log_now:  # the only place that waits for the device
                means = accelerator.reduce(sums, "sum").div(options.log_every).tolist()  # type: ignore[union-attr]
            position.seconds += time.perf_counter() - started
            bar.update()

            # ---- log
            if log_now:
                seconds = position.seconds - window.seconds
                loss = means[-2]
                check_finite(loss, position.step, options)
                line = {
                    "step": position.step,
                    "epoch": round(position.step / steps_per_epoch, 4),
                    "loss": loss,
                    **{f"loss/{name}": mean for name, mean in zip(names, means, strict=False)},
                    "grad_norm": means[-1] / accelerator.num_processes,
                    "lr": scheduler.get_last_lr()[0],
                    "tokens": position.tokens,
                    "tokens_per_second": round((position.tokens - window.tokens) / seconds, 1),
                    "step_seconds": round(seconds / (position.step - window.step), 5),
                    "peak_memory_bytes": peak_memory(device),
                }
                if main:
                    append_line(metrics_path, json.dumps(line))
                bar.note(f"loss {loss:.3f}, {line['tokens_per_second']:.0f} tokens/s")
                sums.zero_()
                window = replace(position)

    # ---- the best weights stay
    accelerator.wait_for_everyone()
    load_state(plain, read_best(checkpoints, position.best_step))
    return position


def check_finite(loss: float, step: int, options: TrainingRecipe) -> None:
    """Stop a run that has diverged."""
    if not math.isfinite(loss):
        raise KdtrainError(
            f"the loss is {loss} at step {step}; lower training.learning_rate "
            f"(now {options.learning_rate}) or training.clip_norm (now {options.clip_norm})"
        )


def describe_training(position: Position, accelerator: Accelerator) -> dict[str, Any]:
    """What the training took."""
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


def parameter_groups(model: torch.nn.Module, options: TrainingRecipe) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def random_state(device: torch.device) -> Tensor:
    """The state of the generators that dropout draws from, as one row of bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).to(device)


def set_random_state(state: Tensor) -> None:
    """The inverse of `random_state`."""
    size = len(torch.get_rng_state())
    # Copies: torch 2.13 reads a view from the start of its storage, which is the state of another process.
    torch.set_rng_state(state[:size].clone())
    if len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone())


def own_part(tensors: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """This process's running sums out of a checkpoint's tensors; its random state is set.

    Where another number of processes goes on, the sums are shared out evenly and dropout draws anew.
    """
    sums, count = tensors["sums"].to(accelerator.device), accelerator.num_processes
    if len(sums) == count:
        set_random_state(tensors["random"][accelerator.process_index])
        return sums[accelerator.process_index]
    if accelerator.is_main_process:
        say(
            f"the checkpoint is of {len(sums)} processes, {count} go on: the same steps, up to the order of sums"
        )
    return sums.sum(0) / count


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """{"accuracy": 0.5} as {"valid/accuracy": 0.5}."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def describe(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
