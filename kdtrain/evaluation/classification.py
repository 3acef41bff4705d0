"""Finished classification runs, measured as a user loads them, and compared in pairs."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kdtrain.checksums import check_sealed
from kdtrain.console import say
from kdtrain.engine.accelerator import start_accelerator
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.measure import MEASURE_ANOTHER, paired_difference
from kdtrain.evaluation.rows import measured_rows
from kdtrain.files import folder_bytes
from kdtrain.models.loading import load_classifier, load_tokenizer, parameter_count
from kdtrain.objective import Objective
from kdtrain.recipe import ClassificationRecipe
from kdtrain.summary import Summary
from kdtrain.tasks.classification.metrics import latency_ms, report
from kdtrain.tasks.classification.outputs import Classifiers
from kdtrain.tasks.classification.task import Classification
from kdtrain.tasks.recipes import load_recipe


def evaluate_run(folder: Path, split: str = "test") -> dict[str, Any]:
    """Load a finished run's student as a user would and measure it on one split of its data.

    Raises:
        KdtrainError: the folder holds no finished run.
    """
    if not (folder / "student").is_dir() or not (folder / "recipe.yaml").is_file():
        raise KdtrainError(f"{folder} holds no finished run: it needs student/ and recipe.yaml")
    check_sealed(folder, MEASURE_ANOTHER, "student")
    run = Classification(load_recipe(folder / "recipe.yaml", kind=ClassificationRecipe))
    data = run.data
    if Summary.load(folder).data["fingerprint"] != data.fingerprint():
        say(
            f"the content of the data has changed since {folder} was trained: these are other rows than its summary's"
        )
    accelerator = start_accelerator(run.recipe.training)
    split_rows = getattr(data, split)
    cache = None if run.teacher is None else run.filled_store(accelerator, split_rows)
    student = load_classifier(str(folder / "student"), "student")
    student.to(accelerator.device).eval()
    run.tokenizer = load_tokenizer(str(folder / "student"), "student")
    rows = run.measured(split, split_rows, cache)
    objective = Objective(student, [], Classifiers())
    logits = measured_rows(objective.measure, rows, accelerator, tokens=run.evaluation_tokens)
    return {
        **report(logits, rows.labels, rows.teacher_logits),
        "parameters": parameter_count(student),
        "bytes": folder_bytes(folder / "student"),
        "latency_ms": latency_ms(student, rows.rows),
    }


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
