"""What all runs of a task share, made before the first of them: data, tokenizers, and the teacher's outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdtrain.console import say
from kdtrain.engine.accelerator import start_accelerator
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.models.tokenizers import stored_tokenizer, train_tokenizer
from kdtrain.study.plan import Cell, StudyRecipe
from kdtrain.tasks.base import SharedInputs
from kdtrain.tasks.classification.splits import ClassificationData
from kdtrain.tasks.classification.task import Classification


def prepare(study: StudyRecipe, cells: list[Cell]) -> list[Cell]:
    """Build what is missing and give the cells with every shared folder named.

    Raises:
        KdtrainError: anything wrong with data, teacher or disk.
    """
    ready = []
    for task, about in study.tasks.items():
        own = [cell for cell in cells if cell.task == task]
        make_data(about, own[0])
        shared = SharedInputs()
        data = Classification(own[0].recipe, shared).data
        rows = ", ".join(f"{len(getattr(data, name)):,} {name}" for name in ("train", "valid", "test"))
        say(f"{task}: {data.name}, {rows} rows, {len(data.classes)} classes, measured by {data.metric}")
        own = [with_tokenizer(study, cell, data) for cell in own]
        ready += with_cache(study, own, shared)
    return ready


def make_data(about: dict[str, Any], cell: Cell) -> None:
    """Build a task's data set where it is one that is made here and is not there yet."""
    kind, path = about.get("build"), cell.recipe.data.path
    if kind is None or (path is not None and (Path(path) / "dataset.json").exists()):
        return
    if kind != "exceptions" or path is None:
        raise KdtrainError(
            f"tasks.{cell.task}.build must be exceptions, beside a data.path, got {kind!r} and {path!r}"
        )
    from kdtrain.data.exceptions import build_exceptions

    build_exceptions(Path(path), ())


def with_tokenizer(study: StudyRecipe, cell: Cell, data: ClassificationData) -> Cell:
    """The cell with the tokenizer of its task and vocabulary size, trained when it is the first to need it."""
    student = cell.recipe.student
    if student.tokenizer is not None or student.path is not None:
        return cell
    folder = Path(study.output) / "tokenizers" / f"{cell.task}-{student.vocab_size}"
    texts = data.train.all_texts() if data.pairs else data.train.texts
    stored_tokenizer(
        folder,
        lambda: train_tokenizer(
            texts, vocab_size=student.vocab_size, max_length=student.max_length, focus=data.focus
        ),
        "student.tokenizer",
    )
    return replace(cell, recipe=cell.recipe.replaced(student=student.replaced(tokenizer=str(folder))))


def shared_cache(study: StudyRecipe, cell: Cell) -> str:
    """Where the teacher's outputs of a task lie."""
    return cell.recipe.teacher.cache or str(Path(study.output) / "teacher-cache" / cell.task)


def with_cache(study: StudyRecipe, cells: list[Cell], shared: SharedInputs) -> list[Cell]:
    """The cells of one task with one cache that holds what any of them needs."""
    first = cells[0].recipe
    if first.teacher.path is None:
        needy = [cell for cell in cells if reads_teacher(cell)]
        if needy:
            raise KdtrainError(
                f"method {needy[0].method} needs a teacher; set tasks.{needy[0].task}.teacher.path"
            )
        return cells
    runs = [Classification(cell.recipe, shared) for cell in cells]
    layers = {layer for run in runs for layer in run.stored_layers}
    given = first.teacher.replaced(
        cache=shared_cache(study, cells[0]),
        layers=tuple(sorted({*first.teacher.layers, *layers})),
        sequences=first.teacher.sequences or any(run.stores_sequences for run in runs),
    )
    cells = [replace(cell, recipe=cell.recipe.replaced(teacher=given)) for cell in cells]
    # The first that learns from the teacher has training rows too; every other one only measures.
    chosen = next((cell for cell in cells if reads_teacher(cell)), cells[0])
    Classification(chosen.recipe, shared).filled_store(start_accelerator(chosen.recipe.training))
    return cells


def reads_teacher(cell: Cell) -> bool:
    """Whether the method of a cell reads the teacher."""
    return any(method_class(one.name).teachers_of(one) for one in cell.recipe.methods)
