"""A finished language-model run measured anew: the student as a user loads it, in float32."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from kdtrain.checksums import check_sealed, seal_again
from kdtrain.data.tokens import token_budget_batches
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.classification import MEASURE_ANOTHER, RESAMPLES
from kdtrain.files import folder_bytes, write_tensors
from kdtrain.models.heads import head_of, hidden_states
from kdtrain.models.loading import load_tokenizer, parameter_count
from kdtrain.tasks.classification.prepare import start_accelerator
from kdtrain.tasks.code_lm.documents import load_held_out
from kdtrain.tasks.code_lm.metrics import EVALUATION_TOKENS, measured_rows
from kdtrain.tasks.code_lm.objective import LanguageObjective
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.recipe import LanguageStudentRecipe, load_language_recipe
from kdtrain.tasks.code_lm.run import open_models, packed

PREDICTIONS = "predictions/valid.safetensors"
LATENCY_ROWS = 20
PROMPT_TOKENS, NEW_TOKENS = 32, 64


def evaluate_language_run(folder: Path) -> dict[str, Any]:
    """Load a finished run's student and measure it on the held-out rows; keep the sums of each row for comparisons.

    Returns:
        rows, tokens (that count), loss (nats a token) with loss_interval (95 %, bootstrap over rows), perplexity, with a
        teacher agreement and divergence, parameters, bytes, latency_ms (one row, next token), generated_per_second.

    Raises:
        KdtrainError: the folder holds no finished run.
    """
    if not (folder / "student").is_dir():
        raise KdtrainError(f"{folder} holds no finished run: it needs student/ and recipe.yaml")
    check_sealed(folder, MEASURE_ANOTHER, "student")
    recipe = load_language_recipe(folder / "recipe.yaml")
    recipe = replace(recipe, student=LanguageStudentRecipe(path=str(folder / "student")))
    tokenizer = load_tokenizer(str(folder / "student"), "student")
    rows = packed(load_held_out(recipe.data, tokenizer), recipe)
    objective = open_models(recipe, tokenizer)
    accelerator = start_accelerator(recipe)
    objective.student.to(accelerator.device).eval()
    if objective.teacher is not None:
        objective.teacher.place(accelerator)
    sums = measure_rows(objective, rows, accelerator.device)
    write_tensors(folder / PREDICTIONS, {"sums": sums, "tokens": rows.tokens, "labels": rows.labels})
    seal_again(folder, PREDICTIONS, MEASURE_ANOTHER)
    total, found = sums.sum(0).tolist(), sums.numpy()
    loss = total[0] / total[3]
    metrics = {
        "rows": len(rows),
        "tokens": int(total[3]),
        "loss": loss,
        "loss_interval": list(interval_per_token(found[:, 0], found[:, 3])),
        "perplexity": math.exp(min(loss, 80.0)),
    }
    if objective.teacher is not None:
        metrics |= {"divergence": total[1] / total[3], "agreement": total[2] / total[3]}
    return {
        **metrics,
        "parameters": parameter_count(objective.student),
        "bytes": folder_bytes(folder / "student"),
        "latency_ms": row_latency_ms(objective.student, rows),
        "generated_per_second": generated_per_second(objective.student, rows),
    }


def measured_file(run: Path) -> Path:
    """Where a run keeps what `evaluate_language_run` measured.

    Raises:
        KdtrainError: it has not been measured.
    """
    path = run / PREDICTIONS
    if not path.is_file():
        raise KdtrainError(f"{run} has not been measured yet; run kdtrain evaluate {run} first")
    check_sealed(run, f"run kdtrain evaluate {run} again", "predictions")
    return path


def compare_language_runs(folder: Path, other: Path) -> tuple[float, float, float]:
    """Held-out loss of one run minus another's, nats a token, with the paired bootstrap interval over rows."""
    found = [load_file(measured_file(run)) for run in (folder, other)]
    if any(not torch.equal(found[0][name], found[1][name]) for name in ("tokens", "labels")):
        raise KdtrainError(f"{folder} and {other} were measured on different held-out rows")
    mine, its = (run["sums"].numpy() for run in found)
    difference = mine[:, 0] - its[:, 0]
    return float(difference.sum() / mine[:, 3].sum()), *interval_per_token(difference, mine[:, 3])


@torch.inference_mode()
def measure_rows(objective: LanguageObjective, rows: PackedRows, device: torch.device) -> Tensor:
    """(rows, 4) float64 on the host: the sums of `row_sums` for every row."""
    sums = torch.zeros(len(rows), 4, dtype=torch.float64)
    for index in token_budget_batches(rows.lengths, EVALUATION_TOKENS):
        sums[index] = measured_rows(objective, rows.batch(index, device)).cpu()
    return sums


def interval_per_token(
    sums: np.ndarray, counts: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of sums.sum() / counts.sum(), both (rows,), with whole rows drawn anew."""
    generator = np.random.default_rng(seed)
    chosen = (generator.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES))
    means = [sums[index].sum() / counts[index].sum() for index in chosen]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@torch.inference_mode()
def row_latency_ms(model: PreTrainedModel, rows: PackedRows) -> float:
    """Median milliseconds from one row to the logits of the token behind it, over rows spread over the split."""
    device = next(model.parameters()).device
    chosen = torch.linspace(0, len(rows) - 1, min(LATENCY_ROWS, len(rows))).long()
    times = []
    for index in [*chosen[:2], *chosen]:  # the first two warm up
        batch = rows.batch(index[None], device)
        start = now(device)
        hidden, _ = hidden_states(model, batch.input_ids, batch.position_ids)
        head_of(model).logits(hidden[:, -1])
        times.append(now(device) - start)
    return float(np.median(times[2:]) * 1000)


@torch.inference_mode()
def generated_per_second(model: PreTrainedModel, rows: PackedRows) -> float:
    """Tokens a second of one greedy continuation, with the keys and values of earlier tokens kept."""
    device = next(model.parameters()).device
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", PROMPT_TOKENS + NEW_TOKENS)
    new = max(1, min(NEW_TOKENS, longest // 2))
    prompt = rows.tokens[: max(1, min(PROMPT_TOKENS, longest - new))].long()[None].to(device)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    start = 0.0
    for _ in range(2):  # the first warms up
        start = now(device)
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)  # type: ignore[operator]
    return new / (now(device) - start)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
