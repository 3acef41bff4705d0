"""One run, from recipe to student: prepare everything, train, measure, save."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.console import say
from kdtrain.engine.run_folder import claimed
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.classification import (
    EvaluationSet,
    classification_metrics,
    latency_ms,
    predict,
    report,
    save_predictions,
)
from kdtrain.files import atomic_folder, folder_bytes, write_tensors
from kdtrain.loop import describe_training, train
from kdtrain.models.loading import parameter_count, quiet
from kdtrain.models.students import build_student
from kdtrain.models.teachers import Teacher
from kdtrain.plots import learning_curves
from kdtrain.recipe import Recipe
from kdtrain.summary import Summary, installed_versions
from kdtrain.tasks.classification.materials import Materials
from kdtrain.tasks.classification.objective import DistillationModel, Method
from kdtrain.tasks.classification.prepare import (
    build_method,
    prepare_cache,
    run_identity,
    start_accelerator,
    student_tokenizer,
    training_rows,
)
from kdtrain.tasks.classification.splits import ClassificationData
from kdtrain.tasks.classification.training_set import TrainingSet


def run(recipe: Recipe, materials: Materials | None = None) -> Summary:
    """Train, measure and save one student; everything lands in `recipe.output`.

    A finished run of the same recipe, data and teacher is recognised and given back; an unfinished one goes on
    exactly where it stopped; another run's folder is refused. `materials` of earlier runs save making them again.

    Raises:
        KdtrainError: anything wrong with recipe, data, teacher or machine, as one sentence.
    """
    folder = Path(recipe.output)
    materials = materials or Materials()
    data, teacher = materials.data(recipe), materials.teacher(recipe)
    if recipe.training.best_metric == "f1" and len(data.classes) != 2:
        raise KdtrainError(
            f"training.best_metric f1 is for two classes, and {data.name} has {len(data.classes)}; macro_f1 is for any"
        )
    accelerator = start_accelerator(recipe)
    identity, student = run_identity(recipe, data, teacher)
    torch.manual_seed(recipe.seed)
    method = build_method(recipe, teacher)
    with claimed(folder, recipe, identity, accelerator) as finished:
        if not finished:
            train_and_save(recipe, materials, method, student, accelerator)
    summary = Summary.load(folder)
    if finished:
        say(f"already done: {summary.line()}")
    return summary


def train_and_save(
    recipe: Recipe,
    materials: Materials,
    method: Method,
    student: PreTrainedModel | None,
    accelerator: Accelerator,
) -> None:
    """The run in its folder, which it holds alone.

    Args:
        student: where the recipe names its first weights.
    """
    folder, data, teacher = Path(recipe.output), materials.data(recipe), materials.teacher(recipe)
    with accelerator.main_process_first():
        tokenizer = student_tokenizer(recipe, data)
    if student is None:
        torch.manual_seed(recipe.seed)  # again: the same first weights whatever the method drew for itself
        student = build_student(recipe.student, tokenizer, data.classes, pairs=data.pairs)
    cache = None
    if teacher is not None:
        with accelerator.main_process_first():
            cache = prepare_cache(recipe, data, teacher, method, accelerator.device)
        teacher.model.cpu()

    rows = training_rows(recipe, data, method)
    stored = (
        cache.rows(rows.keys(), method.teacher_layers) if cache is not None and method.needs_teacher else None
    )
    training = TrainingSet(
        materials.tokens(recipe, f"train, {len(rows)} rows", rows, tokenizer),
        rows.labels,
        stored,
        "none" if not method.teacher_layers else "sequences" if method.whole_sequences else "first tokens",
    )
    valid, test = (
        EvaluationSet.of(split, materials.tokens(recipe, name, split, tokenizer), cache)
        for name, split in (("valid", data.valid), ("test", data.test))
    )

    def evaluate(model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        logits = predict(student, valid.rows, accelerator, precise=False)
        return classification_metrics(logits, valid.labels, valid.teacher_logits)

    position = train(recipe, DistillationModel(student, method), training, evaluate, folder, accelerator)

    valid_logits, test_logits = (predict(student, split.rows, accelerator) for split in (valid, test))
    if accelerator.is_main_process:
        save_student(folder, student, tokenizer, method)
        save_predictions(folder / "predictions" / "valid.safetensors", valid_logits, valid)
        save_predictions(folder / "predictions" / "test.safetensors", test_logits, test)
        learning_curves({folder.name: folder}, folder / "plots" / "learning_curve.png")
        summary = Summary(
            name=folder.name,
            method=recipe.method.name,
            seed=recipe.seed,
            student={
                "architecture": student.config.model_type,
                "parameters": parameter_count(student),
                "bytes": folder_bytes(folder / "student"),
                "latency_ms": latency_ms(student, test.rows),
            },
            test=report(test_logits, test.labels, test.teacher_logits),
            valid=report(valid_logits, valid.labels, valid.teacher_logits),
            teacher=describe_teacher(teacher, test),
            training=describe_training(position, accelerator),
            data={"name": data.name, "fingerprint": data.fingerprint(), "rows": split_sizes(data)},
            versions=installed_versions(),
        )
        summary.save(folder)
        say(summary.line())
    accelerator.wait_for_everyone()


def save_student(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method
) -> None:
    """Write `student/`, and the method's own weights beside it: they are no part of the student."""
    with quiet(), atomic_folder(folder / "student") as temporary:
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    own = method.state_dict()
    if own:
        write_tensors(folder / "projection.safetensors", own)


def describe_teacher(teacher: Teacher | None, test: EvaluationSet) -> dict[str, Any] | None:
    """The teacher's own place in the table."""
    if teacher is None or test.teacher_logits is None:
        return None
    return {
        "path": teacher.path,
        "parameters": parameter_count(teacher.model),
        "test": report(test.teacher_logits, test.labels, None),
    }


def split_sizes(data: ClassificationData) -> dict[str, int]:
    """Rows of each split."""
    return {name: len(getattr(data, name)) for name in ("train", "valid", "test", "unlabelled")}
