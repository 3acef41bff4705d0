"""What all runs of a task share, made before the first of them: data, tokenizers, and the teacher's outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdtrain.console import say
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.models.tokenizers import stored_tokenizer, train_tokenizer
from kdtrain.study.plan import Cell, StudyRecipe
from kdtrain.tasks.classification.materials import Materials
from kdtrain.tasks.classification.prepare import build_method, cache_folder, start_accelerator, training_rows
from kdtrain.tasks.classification.splits import ClassificationData
from kdtrain.teacher_cache.row_build import build_cache
from kdtrain.teacher_cache.row_cache import Identity


def prepare(study: StudyRecipe, cells: list[Cell]) -> list[Cell]:
    """Build what is missing and give the cells with every shared folder named.

    Raises:
        KdtrainError: anything wrong with data, teacher or disk.
    """
    ready = []
    for task, about in study.tasks.items():
        own = [cell for cell in cells if cell.task == task]
        make_data(about, own[0])
        materials = Materials()
        data = materials.data(own[0].recipe)
        rows = ", ".join(f"{len(getattr(data, name)):,} {name}" for name in ("train", "valid", "test"))
        say(f"{task}: {data.name}, {rows} rows, {len(data.classes)} classes, measured by {data.metric}")
        own = [with_tokenizer(study, cell, data) for cell in own]
        ready += with_cache(study, own, materials)
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
    return replace(cell, recipe=replace(cell.recipe, student=replace(student, tokenizer=str(folder))))


def shared_cache(study: StudyRecipe, cell: Cell) -> str:
    """Where the teacher's outputs of a task lie."""
    return cell.recipe.teacher.cache or str(Path(study.output) / "teacher-cache" / cell.task)


def with_cache(study: StudyRecipe, cells: list[Cell], materials: Materials) -> list[Cell]:
    """The cells of one task with one cache that holds what any of them needs."""
    first = cells[0].recipe
    data, teacher = materials.data(first), materials.teacher(first)
    if teacher is None:
        needy = [cell for cell in cells if method_class(cell.recipe.method.name).needs_teacher]
        if needy:
            raise KdtrainError(
                f"method {needy[0].method} needs a teacher; set tasks.{needy[0].task}.teacher.path"
            )
        return cells
    methods = [build_method(cell.recipe, teacher) for cell in cells]
    layers = tuple(sorted({layer for method in methods for layer in method.teacher_layers}))
    sequences = first.teacher.sequences or any(method.whole_sequences for method in methods)
    given = replace(
        first.teacher,
        cache=shared_cache(study, cells[0]),
        layers=tuple(sorted({*first.teacher.layers, *layers})),
        sequences=sequences,
    )
    cells = [replace(cell, recipe=replace(cell.recipe, teacher=given)) for cell in cells]
    rows = data.valid + data.test
    for cell, method in zip(cells, methods, strict=True):
        if method.needs_teacher:
            rows = training_rows(cell.recipe, data, method) + data.valid + data.test
            break
    recipe = cells[0].recipe
    identity = Identity.of(
        teacher, focus=data.focus, dtype=given.dtype, layers=given.layers, sequences=sequences
    )
    build_cache(
        cache_folder(recipe),
        teacher,
        identity,
        rows,
        batch_tokens=given.batch_tokens,
        device=start_accelerator(recipe).device,
    )
    return cells
