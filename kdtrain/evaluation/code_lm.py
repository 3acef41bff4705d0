"""A finished language-model run measured anew: the student as a user loads it, in float32."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from kdtrain.checksums import check_sealed, seal_again
from kdtrain.engine.accelerator import start_accelerator
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.measure import MEASURE_ANOTHER, bootstrap_interval, median_ms, now, paired_difference
from kdtrain.evaluation.rows import measured_rows
from kdtrain.files import folder_bytes, write_tensors
from kdtrain.models.heads import head_of, hidden_states
from kdtrain.models.loading import load_tokenizer, parameter_count
from kdtrain.outputs import Batch
from kdtrain.recipe import LanguageRecipe, LanguageStudentSection
from kdtrain.tasks.base import TrainingData
from kdtrain.tasks.code_lm.documents import load_held_out
from kdtrain.tasks.code_lm.metrics import language_metrics
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.task import CodeLM
from kdtrain.tasks.recipes import load_recipe

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
    recipe = load_recipe(folder / "recipe.yaml", kind=LanguageRecipe)
    recipe = recipe.replaced(student=LanguageStudentSection(path=str(folder / "student")))
    run = CodeLM(recipe)
    run.tokenizer = tokenizer = load_tokenizer(str(folder / "student"), "student")
    rows = run.packed(load_held_out(recipe.data, tokenizer))
    student, models = run.student, run.models
    accelerator = start_accelerator(recipe.training)
    student.to(accelerator.device).eval()
    if run.models.teacher is not None:
        run.models.teacher.place(accelerator)
    data: TrainingData = rows
    if (
        models.teacher is not None and not models.teacher.runs_here
    ):  # the run has stored what the servers answered
        data = run.computed(rows, "hidden", accelerator)
    sums = measured_rows(
        lambda batch: models.measure(student, batch), data, accelerator, tokens=run.evaluation_tokens
    )
    write_tensors(folder / PREDICTIONS, {"sums": sums, "tokens": rows.tokens, "labels": rows.labels})
    seal_again(folder, PREDICTIONS, MEASURE_ANOTHER)
    found = sums.numpy()
    return {
        "rows": len(rows),
        "tokens": int(found[:, 3].sum()),
        "loss_interval": list(bootstrap_interval(found[:, 0], found[:, 3])),
        **language_metrics(sums, teacher=run.models.teacher is not None),
        "parameters": parameter_count(student),
        "bytes": folder_bytes(folder / "student"),
        "latency_ms": row_latency_ms(student, rows),
        "generated_per_second": generated_per_second(student, rows),
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
    sums, others = (run["sums"].numpy() for run in found)
    return paired_difference(sums[:, 0], others[:, 0], sums[:, 3])


def row_latency_ms(model: PreTrainedModel, rows: PackedRows) -> float:
    """Median milliseconds from one row to the logits of the token after it, over rows spread over the split."""
    device = next(model.parameters()).device
    chosen = torch.linspace(0, len(rows) - 1, min(LATENCY_ROWS, len(rows))).long()

    def next_token(batch: Batch) -> None:
        hidden, _ = hidden_states(model, batch.input_ids, batch.positions)
        head_of(model).logits(hidden[:, -1])

    return median_ms(next_token, [rows.batch(index[None], device) for index in chosen], device, warm_up=2)


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
