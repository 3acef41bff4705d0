"""The training loop: one function, top to bottom."""

import json
import math
import resource
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from kdtrain.cache import TeacherRows
from kdtrain.checkpoint import Position, load_best, load_checkpoint, save_best, save_checkpoint
from kdtrain.data.tokens import TokenRows, length_grouped_batches
from kdtrain.errors import KdtrainError
from kdtrain.evaluate import EvaluationSet, classification_metrics, predict
from kdtrain.files import append_line, write_atomic
from kdtrain.objective import Batch, DistillationModel
from kdtrain.progress import progress, say
from kdtrain.recipe import Recipe, TrainingRecipe


@dataclass(frozen=True)
class TrainingSet:
    """Tokenized training rows, their labels, and the stored teacher outputs where the method needs them."""

    rows: TokenRows
    labels: Tensor
    teacher: TeacherRows | None = None
    with_states: bool = False

    def batch(self, index: Tensor, device: torch.device) -> Batch:
        """The given rows, padded to the longest of them."""
        input_ids, mask = self.rows.batch(index)
        return Batch(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            labels=self.labels[index].to(device),
            teacher_logits=None if self.teacher is None else self.teacher.logits[index].to(device),
            teacher_states=self.teacher.states(index).to(device)
            if self.teacher and self.with_states
            else None,
        )


def train(
    recipe: Recipe,
    model: DistillationModel,
    data: TrainingSet,
    valid: EvaluationSet,
    folder: Path,
    accelerator: Accelerator,
) -> Position:
    """Train `model` as the recipe says and leave it with its best weights.

    Writes `metrics.jsonl` and `checkpoints/` into `folder`; where those hold an unfinished run, goes on from there
    exactly as if it had never stopped. Gives the last position, which names the best step.
    """
    # ---- set up
    options = recipe.training
    device, main = accelerator.device, accelerator.is_main_process
    steps_per_epoch = math.ceil(len(data.rows) / options.batch_size)
    total_steps = min(options.max_steps or options.epochs * steps_per_epoch, options.epochs * steps_per_epoch)
    evaluate_every = options.evaluate_every or steps_per_epoch
    pieces = options.accumulation * accelerator.num_processes
    names = list(model.method.weights)
    weights = list(model.method.weights.values())

    plain = model.to(device)
    optimizer: Any = torch.optim.AdamW(parameter_groups(plain, options), lr=options.learning_rate, fused=True)
    scheduler = get_scheduler(
        options.schedule,
        optimizer,
        num_warmup_steps=round(options.warmup * total_steps),
        num_training_steps=total_steps,
    )
    # The scheduler stays outside of prepare(), which would step it once per process.
    model, optimizer = accelerator.prepare(plain, optimizer)
    parameters = list(plain.parameters())

    checkpoints, metrics_path = folder / "checkpoints", folder / "metrics.jsonl"
    torch.manual_seed(recipe.seed * 1000 + accelerator.process_index)
    position, sums = Position(), torch.zeros(len(names) + 1, device=device)
    resumed = load_checkpoint(checkpoints, plain, optimizer, scheduler, accelerator.scaler)
    if resumed is not None:
        position, tensors = resumed
        sums = tensors["sums"][accelerator.process_index].to(device)
        set_random_state(tensors["random"][accelerator.process_index])
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
                logits = predict(plain.student, valid.rows, accelerator, precise=False)
                metrics = classification_metrics(logits, valid.labels, valid.teacher_logits)
                value = metrics[options.best_metric] * (-1 if options.best_metric == "loss" else 1)
                if position.best_value is None or value > position.best_value:
                    position.best_step, position.best_value = step, value
                    if main:
                        save_best(checkpoints, step, plain)
                if main:
                    append_line(metrics_path, json.dumps({"step": step, **prefixed("valid", metrics)}))
                    say(f"{folder.name}: step {step}/{total_steps} {describe(metrics)}")
                model.train()
                evaluated = step

            # ---- save
            if step > saved and evaluated == step:
                tensors = {"random": random_state(device), "sums": sums}
                tensors = {name: accelerator.gather(value[None]).cpu() for name, value in tensors.items()}  # type: ignore[union-attr]
                if main:
                    save_checkpoint(
                        checkpoints, position, plain, optimizer, scheduler, accelerator.scaler, tensors
                    )
                accelerator.wait_for_everyone()
                saved = step

            if step == total_steps:
                break

            # ---- step
            started = time.perf_counter()
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                plan = length_grouped_batches(data.rows.lengths, options.batch_size, recipe.seed, epoch)
            batch_rows = plan[step % steps_per_epoch]
            mine = batch_rows.tensor_split(pieces)[accelerator.process_index :: accelerator.num_processes]
            for number, piece in enumerate(mine):
                # Every process takes part in every exchange: an empty piece runs one row and counts it as nothing.
                share = accelerator.num_processes if len(piece) else 0  # DDP averages, the loss is a sum
                batch = data.batch(piece if len(piece) else batch_rows[:1], device)
                last = number == len(mine) - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    loss, terms = model(batch, len(batch_rows))
                    accelerator.backward(loss * share)
                sums[:-1] += terms * (share / (len(batch_rows) * accelerator.num_processes))
            norm = accelerator.clip_grad_norm_(parameters, options.clip_norm)
            sums[-1] += 0.0 if norm is None else norm  # None under DeepSpeed, which clips for itself
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            position.step += 1
            position.tokens += int(data.rows.lengths[batch_rows].sum())
            log_now = position.step % options.log_every == 0
            if log_now:  # the only place that waits for the device
                means = accelerator.reduce(sums, "sum").div(options.log_every).tolist()  # type: ignore[union-attr]
            position.seconds += time.perf_counter() - started
            bar.update()

            # ---- log
            if log_now:
                seconds = position.seconds - window.seconds
                loss = sum(weight * mean for weight, mean in zip(weights, means, strict=False))
                if not math.isfinite(loss):
                    raise KdtrainError(
                        f"the loss is {loss} at step {position.step}; lower training.learning_rate "
                        f"(now {options.learning_rate}) or training.clip_norm (now {options.clip_norm})"
                    )
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
    load_best(checkpoints, position.best_step, plain)
    return position


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
    torch.set_rng_state(state[:size])
    if len(state) > size:
        torch.cuda.set_rng_state(state[size:])


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of `metrics.jsonl` that were written after the checkpoint a run goes on from."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last_step]
    write_atomic(path, "".join(f"{line}\n" for line in kept))


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
