"""Checks of a classification run: its teacher, and what its outputs take on disk."""

import shutil
from collections.abc import Iterator

import torch

from kdtrain.doctor import Finding, error, info, warning
from kdtrain.doctor.subject import CPU, Subject
from kdtrain.files import human_bytes
from kdtrain.models.loading import shape_of
from kdtrain.tasks.classification.pairs import PairRows
from kdtrain.tasks.classification.teacher_outputs import teacher_outputs


def teacher_knows_the_task(subject: Subject) -> Iterator[Finding]:
    """The teacher's accuracy on a sample, and whether another order of its outputs would be right."""
    if subject.teacher is None:
        return
    data, logits, labels = subject.data, subject.teacher_logits, subject.sample.labels
    accuracy = float((logits.argmax(dim=1) == labels).double().mean())
    largest = float(torch.bincount(labels).max() / len(labels))
    text = f"the teacher is right for {accuracy:.1%} of {len(labels)} validation rows, the largest class is {largest:.1%} of them"
    if len(data.classes) == 2 and accuracy < 0.5 and 1 - accuracy > largest:
        yield error(
            "KD201", f"{text}: its two classes stand the other way round; set teacher.class_order to [1, 0]"
        )
    elif accuracy < largest:
        yield warning(
            "KD202", f"{text}: is it a teacher of this task, and do its classes stand in this order?"
        )
    else:
        yield info("KD203", text)


def teacher_answers_alike(subject: Subject) -> Iterator[Finding]:
    """Dropout is off and padding is not read: the same rows twice, and once in a padded batch."""
    if subject.teacher is None:
        return
    rows = subject.teacher_rows()
    order = torch.argsort(rows.lengths)
    index = torch.stack([order[0], order[-1]])
    layers = subject.task.stored_layers[-1:]
    outputs = [teacher_outputs(subject.teacher, rows, index, layers, CPU) for _ in range(2)]
    alone = teacher_outputs(subject.teacher, rows, index[:1], layers, CPU)
    if not torch.equal(outputs[0].logits, outputs[1].logits):
        yield error(
            "KD204",
            "the teacher answers the same rows differently each time: some dropout of it stays on in eval mode",
        )
    if not torch.allclose(alone.logits, outputs[0].logits[:1], rtol=1e-3, atol=1e-3):
        yield error(
            "KD205", "the teacher's answer depends on padding: its model does not use the attention mask"
        )


def cache_fits(subject: Subject) -> Iterator[Finding]:
    """What the teacher's outputs take on disk."""
    teacher, task, data = subject.teacher, subject.task, subject.data
    if teacher is None:
        return
    count = len(task.cached_rows)
    layers = len({*subject.recipe.teacher.layers, *task.stored_layers})
    rows = subject.teacher_rows()
    lengths = (rows.texts if isinstance(rows, PairRows) else rows).lengths.double()
    parts = 2 if data.pairs else 1
    each = float(lengths.mean()) if task.stores_sequences or subject.recipe.teacher.sequences else 1.0
    size = 2 if subject.recipe.teacher.dtype == "float16" else 4
    need = count * (
        16 + 4 * len(data.classes) + parts * each * layers * shape_of(teacher.model.config).width * size
    )
    place = task.cache_folder
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"the teacher's outputs take about {human_bytes(need)} ({count:,} rows) below {place}"
    if need > free and not place.exists():
        yield error(
            "KD206",
            f"{text}, and {human_bytes(free)} are free there: give another teacher.cache, or fewer rows (data.limit)",
        )
    else:
        yield info("KD207", text)
