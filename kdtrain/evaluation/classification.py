"""How good, how faithful, how large and how fast: measured on logits, models and finished run folders."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from torch import Tensor, nn

from kdtrain.checksums import check_sealed
from kdtrain.console import say
from kdtrain.data.tokens import token_budget_batches
from kdtrain.errors import KdtrainError
from kdtrain.files import folder_bytes, write_tensors
from kdtrain.models.loading import load_classifier, load_tokenizer, parameter_count
from kdtrain.recipe import load_recipe
from kdtrain.summary import Summary
from kdtrain.tasks.classification.pairs import Rows, tokenize_split
from kdtrain.tasks.classification.prepare import (
    build_method,
    open_teacher,
    prepare_cache,
    start_accelerator,
    student_insert,
)
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.tasks.classification.splits import load_classification
from kdtrain.teacher_cache.row_cache import TeacherCache

EVALUATION_TOKENS = 8192
MEASURE_ANOTHER = "run the training again in another output, or measure another run"
RESAMPLES = 2000


@dataclass(frozen=True)
class EvaluationSet:
    """Tokenized rows to measure on; the teacher's logits where a teacher is known."""

    rows: Rows
    labels: Tensor
    digest: str
    """of the texts, see `TextRows.digest`"""
    teacher_logits: Tensor | None = None

    @classmethod
    def of(cls, split: TextRows, rows: Rows, cache: TeacherCache | None) -> "EvaluationSet":
        """A tokenized split, with what the teacher says where a cache is at hand."""
        logits = None if cache is None else cache.rows(split.keys()).logits
        return cls(rows, split.labels, split.digest(), logits)


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, accelerator: Accelerator, *, precise: bool = True) -> Tensor:
    """Logits (rows, C) float32 on the host; processes share the work.

    `precise` computes in float32, as the saved student does when it is loaded; otherwise in the run's precision.
    """
    model.eval()
    batches = token_budget_batches(rows.lengths, EVALUATION_TOKENS)
    parts, places = [], []
    with nullcontext() if precise else accelerator.autocast():
        for index in batches[accelerator.process_index :: accelerator.num_processes]:
            input_ids, mask = rows.batch(index)
            output = model(
                input_ids=input_ids.to(accelerator.device), attention_mask=mask.to(accelerator.device)
            )
            parts.append(output.logits.float())
            places.append(index)
    logits = torch.zeros(len(rows), model.config.num_labels, device=accelerator.device)  # type: ignore[union-attr]
    if parts:
        logits[torch.cat(places).to(accelerator.device)] = torch.cat(parts)
    return accelerator.reduce(logits, "sum").cpu()  # type: ignore[union-attr]


def classification_metrics(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None
) -> dict[str, float]:
    """Accuracy, top-3 accuracy, macro F1 over the classes that occur, cross-entropy, and agreement with the teacher.

    With two classes also f1, that of the second.

    Args:
        logits: (rows, C) float32.
        labels: (rows,) int64.
        teacher_logits: (rows, C); agreement is the share of rows in which both name the same class.
    """
    predicted = logits.argmax(dim=1)
    top = logits.topk(min(3, logits.shape[1]), dim=1).indices
    metrics = {
        "accuracy": float((predicted == labels).double().mean()),
        "top3": float((top == labels[:, None]).any(dim=1).double().mean()),
        "macro_f1": float(f1_score(labels.numpy(), predicted.numpy(), average="macro")),
        "loss": float(nn.functional.cross_entropy(logits.double(), labels)),
    }
    if logits.shape[1] == 2:
        metrics["f1"] = float(f1_score(labels.numpy(), predicted.numpy()))
    if teacher_logits is not None:
        metrics["agreement"] = float((predicted == teacher_logits.argmax(dim=1)).double().mean())
    return metrics


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, one per row (2000 resamples)."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    correct: np.ndarray, other: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `correct - other` over the same rows, with its bootstrap interval: (difference, low, high)."""
    difference = correct.astype(np.float64) - other.astype(np.float64)
    return float(difference.mean()), *bootstrap_interval(difference, level=level, seed=seed)


@torch.inference_mode()
def latency_ms(model: nn.Module, rows: Rows, *, count: int = 100) -> float:
    """Median milliseconds of one forward pass of one row, over `count` rows spread over the split, in float32."""
    model.eval()
    device = next(model.parameters()).device
    chosen = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()
    batches = [tuple(tensor.to(device) for tensor in rows.batch(index[None])) for index in chosen]
    times = []
    for input_ids, mask in batches[:5] + batches:  # the first five warm up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(input_ids=input_ids, attention_mask=mask)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:]) * 1000)


def report(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> dict[str, Any]:
    """The metrics of one split with the bootstrap interval of the accuracy."""
    correct = (logits.argmax(dim=1) == labels).numpy().astype(np.float64)
    return {
        **classification_metrics(logits, labels, teacher_logits),
        "accuracy_interval": list(bootstrap_interval(correct)),
        "rows": len(labels),
    }


def evaluate_run(folder: Path, split: str = "test") -> dict[str, Any]:
    """Load a finished run's student as a user would and measure it anew on one split of its data.

    Raises:
        KdtrainError: the folder holds no finished run.
    """
    if not (folder / "student").is_dir() or not (folder / "recipe.yaml").is_file():
        raise KdtrainError(f"{folder} holds no finished run: it needs student/ and recipe.yaml")
    check_sealed(folder, MEASURE_ANOTHER, "student")
    recipe = load_recipe(folder / "recipe.yaml")
    data = load_classification(recipe.data)
    if Summary.load(folder).data["fingerprint"] != data.fingerprint():
        say(
            f"the content of the data has changed since {folder} was trained: these are other rows than its summary's"
        )
    accelerator = start_accelerator(recipe)
    teacher = open_teacher(recipe, data)
    cache = None
    if teacher is not None:
        cache = prepare_cache(recipe, data, teacher, build_method(recipe, teacher), accelerator.device)
    student = load_classifier(str(folder / "student"), "student")
    student.to(accelerator.device)
    tokenizer = load_tokenizer(str(folder / "student"), "student")
    measured = getattr(data, split)
    insert = student_insert(recipe.student, tokenizer)
    tokens = tokenize_split(measured, tokenizer, recipe.student.max_length, data.focus, insert)
    rows = EvaluationSet.of(measured, tokens, cache)
    return {
        **report(predict(student, rows.rows, accelerator), rows.labels, rows.teacher_logits),
        "parameters": parameter_count(student),
        "bytes": folder_bytes(folder / "student"),
        "latency_ms": latency_ms(student, rows.rows),
    }


def save_predictions(path: Path, logits: Tensor, split: EvaluationSet) -> None:
    """Keep logits and labels, for paired comparisons of runs, and which texts they are of."""
    tensors = {"logits": logits, "labels": split.labels}
    if split.teacher_logits is not None:
        tensors["teacher_logits"] = split.teacher_logits
    write_tensors(path, tensors, {"texts": split.digest})


def compare_runs(folder: Path, other: Path, split: str = "test") -> tuple[float, float, float]:
    """Accuracy of one run minus another's on the same rows, with the paired bootstrap interval.

    Raises:
        KdtrainError: a run that is not finished, or that was measured on other rows.
    """
    found, texts = [], []
    for run in (folder, other):
        path = run / "predictions" / f"{split}.safetensors"
        if not path.is_file():
            raise KdtrainError(f"{run} holds no finished run: {path} is missing")
        check_sealed(run, MEASURE_ANOTHER, "predictions")
        found.append(load_file(path))
        with safe_open(path, framework="pt") as file:
            texts.append(file.metadata()["texts"])
    if texts[0] != texts[1] or not torch.equal(found[0]["labels"], found[1]["labels"]):
        raise KdtrainError(
            f"{folder} and {other} were measured on different {split} rows, which make no pairs; compare runs of one data set"
        )
    correct = [(run["logits"].argmax(dim=1) == run["labels"]).numpy() for run in found]
    return paired_difference(*correct)
