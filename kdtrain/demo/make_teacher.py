"""Make the demo's teacher: masked-language-model stage, then fine-tuning, on the training side of the split only.

Run with `kdtrain demo --train-teacher`; recipes/code-mlm.yaml and recipes/teacher.yaml are the same two stages for larger
models. The shipped one (kdtrain/teacher/) was made by an earlier form of the first stage (one loop of its own, no held-out
measure); its teacher.json says from which distributions, and what it scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kdtrain.data.exceptions import build_exceptions
from kdtrain.files import atomic_folder, write_json
from kdtrain.methods import method_options
from kdtrain.models.loading import load_classifier, load_tokenizer, parameter_count
from kdtrain.recipe import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    MaskedDataSection,
    MaskedRecipe,
    MaskedTraining,
    StudentSection,
)
from kdtrain.run import run
from kdtrain.summary import Summary, installed_versions

SHAPE = StudentSection(
    vocab_size=8000,
    hidden_size=192,
    layers=4,
    heads=4,
    intermediate_size=768,
    max_length=128,
    dropout=0.1,
)
FINE_TUNING = ClassificationTraining(
    num_train_epochs=2,
    batch_size=32,
    learning_rate=2.5e-4,
    eval_steps=225,
    metric_for_best_model="accuracy",
    logging_steps=50,
)
PRETRAINING = MaskedTraining(
    max_steps=4500, batch_size=32, learning_rate=1e-3, warmup_ratio=0.06, eval_steps=500
)


@dataclass(frozen=True)
class TeacherPlan:
    """What is trained. The defaults have the shipped teacher's shape: 3.4 million parameters, 6.8 MB in half precision."""

    shape: StudentSection = SHAPE
    pretraining: MaskedTraining = PRETRAINING
    fine_tuning: ClassificationTraining = FINE_TUNING


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
    stage is not repeated, an unfinished one goes on from its last checkpoint.
    """
    plan = plan or TeacherPlan()
    if not (work / "data" / "dataset.json").exists():
        build_exceptions(work / "data", trees, site_packages=site_packages)
    run(
        MaskedRecipe(
            data=MaskedDataSection(
                kind="exceptions",
                train=tuple(str(tree) for tree in trees),
                site_packages=tuple(str(folder) for folder in site_packages),
            ),
            student=plan.shape,
            training=plan.pretraining,
            output=str(work / "pretrained"),
        )
    )
    recipe = ClassificationRecipe(
        data=DataSection(path=str(work / "data")),
        student=StudentSection(path=str(work / "pretrained" / "student"), max_length=plan.shape.max_length),
        method=(method_options("ft"),),
        training=plan.fine_tuning,
        output=str(work / "fine-tuned"),
    )
    summary = run(recipe)
    export(work, teacher, summary)
    return summary


def export(work: Path, teacher: Path, summary: Summary) -> None:
    """Save the fine-tuned model in half precision with its tokenizer and what it was made from."""
    student = work / "fine-tuned" / "student"
    model = load_classifier(str(student), "student")
    with atomic_folder(teacher) as folder:
        model.to(torch.float16).save_pretrained(folder)
        load_tokenizer(str(student), "student").save_pretrained(folder)
        write_json(folder / "teacher.json", describe(work, model, summary))


def describe(work: Path, model: PreTrainedModel, summary: Summary) -> dict[str, Any]:
    """What the teacher is, what it was trained on and how well it does."""
    pretraining = Summary.load(work / "pretrained")
    data = json.loads((work / "data" / "dataset.json").read_text())
    return {
        "made": date.today().isoformat(),
        "recipe": "kdtrain demo --train-teacher (kdtrain/demo/make_teacher.py)",
        "parameters": parameter_count(model),
        "vocabulary": model.config.vocab_size,
        "stored_as": "float16",
        "test": summary.test,
        "valid": summary.valid,
        "fine_tuning": {"rows": data["rows"], "labels": data["labels"]["train"], **summary.training},
        "pretraining": {
            **pretraining.valid,
            **pretraining.training,
            **{name: pretraining.data[name] for name in ("rows", "functions", "sources")},
        },
        "versions": installed_versions(),
    }
