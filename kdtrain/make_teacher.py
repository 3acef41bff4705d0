"""Make the demo's teacher: masked-language-model stage, then fine-tuning, on the training side of the split only.

Run with `kdtrain demo --train-teacher`. The shipped one (kdtrain/teacher/) was made by the same code; its
teacher.json says from which distributions, and what it scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from kdtrain.data.exceptions import build_exceptions, collect_functions, source_files, without_duplicates
from kdtrain.data.handlers import HOLE
from kdtrain.data.sources import split_of
from kdtrain.files import atomic_folder, write_json
from kdtrain.models import parameter_count, roberta_config
from kdtrain.pretrain import hidden_name_windows, pretrain
from kdtrain.progress import say
from kdtrain.recipe import DataRecipe, MethodRecipe, Recipe, StudentRecipe, TrainingRecipe
from kdtrain.run import run
from kdtrain.summary import Summary, installed_versions
from kdtrain.tokenizers import train_tokenizer

SHAPE = StudentRecipe(
    vocab_size=8000,
    hidden_size=192,
    layers=4,
    heads=4,
    intermediate_size=768,
    max_length=128,
    dropout=0.1,
)
FINE_TUNING = TrainingRecipe(
    epochs=2, batch_size=32, learning_rate=2.5e-4, evaluate_every=225, best_metric="accuracy", log_every=50
)


@dataclass(frozen=True)
class TeacherPlan:
    """What is trained. The defaults made the shipped teacher: 3.4 million parameters, 6.8 MB in half precision."""

    shape: StudentRecipe = SHAPE
    pretraining_steps: int = 4500
    fine_tuning: TrainingRecipe = FINE_TUNING


def make_teacher(
    work: Path,
    teacher: Path,
    *,
    plan: TeacherPlan | None = None,
    trees: Sequence[Path] = (),
    site_packages: Sequence[Path] = (),
) -> Summary:
    """Train a teacher from the code installed here (and in further `site_packages` folders) and save it to `teacher`.

    With `trees` the code below those folders is used instead. `work` keeps the intermediate folders; a finished
    stage is not repeated.
    """
    plan = plan or TeacherPlan()
    data, pretrained = work / "data", work / "pretrained"
    if not (data / "dataset.json").exists():
        build_exceptions(data, trees, site_packages=site_packages)
    if not (pretrained / "pretraining.json").exists():
        pretrain_on_code(pretrained, plan, trees, site_packages)
    recipe = Recipe(
        data=DataRecipe(path=str(data)),
        student=StudentRecipe(path=str(pretrained), max_length=plan.shape.max_length),
        method=MethodRecipe(name="ft"),
        training=plan.fine_tuning,
        output=str(work / "fine-tuned"),
    )
    summary = run(recipe)
    export(work, teacher, summary)
    return summary


def pretrain_on_code(
    output: Path, plan: TeacherPlan, trees: Sequence[Path], site_packages: Sequence[Path]
) -> None:
    """Train tokenizer and encoder; duplicates of code on the test side are taken out of the training side first."""
    files, distributions = source_files(trees, site_packages)
    functions = [
        function
        for function in without_duplicates(collect_functions(files, raises=True))
        if split_of(function.module) == "train"
    ]
    say(f"pre-training on {len(functions):,} functions of the training side")
    tokenizer = train_tokenizer(
        [function.text for function in functions],
        vocab_size=plan.shape.vocab_size,
        max_length=plan.shape.max_length,
        focus=HOLE,
    )
    rows, names = hidden_name_windows(functions, tokenizer, plan.shape.max_length)
    config = roberta_config(plan.shape, tokenizer)
    result = pretrain(rows, names, tokenizer, config, output, steps=plan.pretraining_steps)
    write_json(
        output / "pretraining.json",
        {
            "functions": len(functions),
            "windows": len(rows),
            "steps": plan.pretraining_steps,
            **result,
            "sources": [asdict(one) for one in distributions],
        },
    )


def export(work: Path, teacher: Path, summary: Summary) -> None:
    """Save the fine-tuned model in half precision with its tokenizer and what it was made from."""
    student = work / "fine-tuned" / "student"
    model = AutoModelForSequenceClassification.from_pretrained(student)
    with atomic_folder(teacher) as folder:
        model.to(torch.float16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(student).save_pretrained(folder)
        write_json(folder / "teacher.json", describe(work, model, summary))


def describe(work: Path, model: PreTrainedModel, summary: Summary) -> dict[str, Any]:
    """What the teacher is, what it was trained on and how well it does."""
    pretraining = json.loads((work / "pretrained" / "pretraining.json").read_text())
    data = json.loads((work / "data" / "dataset.json").read_text())
    return {
        "made": date.today().isoformat(),
        "recipe": "kdtrain demo --train-teacher (kdtrain/make_teacher.py)",
        "parameters": parameter_count(model),
        "vocabulary": model.config.vocab_size,
        "stored_as": "float16",
        "test": summary.test,
        "valid": summary.valid,
        "fine_tuning": {"rows": data["rows"], "labels": data["labels"]["train"], **summary.training},
        "pretraining": pretraining,
        "versions": installed_versions(),
    }
