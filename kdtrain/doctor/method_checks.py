"""Checks of a classification run: student, method and training."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdtrain.doctor import Finding, error, info, warning
from kdtrain.doctor.subject import CPU, Subject
from kdtrain.files import human_bytes
from kdtrain.methods.kd import KDOptions
from kdtrain.models.loading import parameter_count, shape_of
from kdtrain.models.students import build_student
from kdtrain.objective import Objective
from kdtrain.outputs import Batch
from kdtrain.tasks.classification.outputs import Classifiers
from kdtrain.tasks.classification.pairs import PairRows
from kdtrain.tasks.classification.teacher_outputs import teacher_outputs


def named(subject: Subject, name: str) -> Any:
    """The options of the method of this name; None where the recipe does not name it."""
    return next((one for one in subject.recipe.methods if one.name == name), None)


def what_is_trained(subject: Subject) -> Iterator[Finding]:
    """Sizes, steps: what the run will be."""
    recipe, data = subject.recipe, subject.data
    torch.manual_seed(recipe.seed)
    student = build_student(recipe.student, subject.tokenizer, data.classes, pairs=data.pairs)
    rows = len(subject.task.training_rows)
    training = recipe.training
    steps = training.max_steps or math.ceil(-(-rows // training.batch_size) * training.num_train_epochs)
    yield info(
        "KD301",
        f"{data.name}: {rows:,} rows to train on, {steps:,} steps of {training.batch_size}; student of "
        f"{parameter_count(student):,} parameters, about {human_bytes(16 * parameter_count(student))} for weights, "
        "gradients and optimizer",
    )


def loss_ignores_padding(subject: Subject) -> Iterator[Finding]:
    """The loss of one batch with 0 and with 7 more columns of padding, dropout off."""
    recipe, data = subject.recipe, subject.data
    torch.manual_seed(recipe.seed)
    student = build_student(recipe.student, subject.tokenizer, data.classes, pairs=data.pairs)
    model = Objective(student, subject.methods, Classifiers()).eval()
    rows, index = (
        subject.student_rows(recipe.student.max_length - 7),
        torch.arange(min(4, len(subject.sample))),
    )
    input_ids, mask = rows.batch(index)
    batch = Batch(input_ids, subject.sample.labels[index], index, mask)
    if subject.teacher is not None and subject.task.learns_from_teacher:
        batch = replace(batch, stored={"teacher": teacher_part(subject, index)})
    pad = (rows.texts if isinstance(rows, PairRows) else rows).pad_id
    wider = replace(
        batch,
        input_ids=torch.nn.functional.pad(input_ids, (0, 7), value=pad),
        attention_mask=torch.nn.functional.pad(mask, (0, 7)),
    )
    with torch.no_grad():
        first, second = (float(model(one, len(index))[0]) for one in (batch, wider))
    if not abs(first - second) <= 1e-3 * (1 + abs(first)):
        yield error(
            "KD302",
            f"the loss is {first:.6g}, and {second:.6g} with 7 more columns of padding: the student reads padding",
        )


def teacher_part(subject: Subject, index: Tensor) -> dict[str, Tensor]:
    """The outputs of the teacher of the given rows of the sample, as they are stored."""
    teacher, task = subject.teacher, subject.task
    assert teacher is not None
    outputs = teacher_outputs(
        teacher, subject.teacher_rows(), index, task.stored_layers, CPU, sequences=task.stores_sequences
    )
    found = {"logits": outputs.logits}
    if outputs.states is not None and outputs.lengths is not None:
        parts = outputs.states.split(outputs.lengths.flatten().tolist())
        found["states"] = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2)
        found["mask"] = torch.arange(found["states"].shape[2]) < outputs.lengths.flatten()[:, None]
    elif outputs.states is not None:
        found["states"] = outputs.states.flatten(0, 1)
    return found


def correlation_has_a_gradient(subject: Subject) -> Iterator[Finding]:
    """DIST's inter-class term with two classes."""
    dist = named(subject, "dist")
    if dist is not None and len(subject.data.classes) == 2 and dist.inter_weight:
        yield warning(
            "KD303",
            "method dist: with two classes the correlation across classes is always +1 or -1 and has no gradient, so "
            "only the correlation across the batch teaches; set method.inter_weight to 0 to say so",
        )


def batch_is_large_enough(subject: Subject) -> Iterator[Finding]:
    """DIST's correlation over a batch of few rows."""
    if named(subject, "dist") is not None and subject.recipe.training.batch_size < 8:
        yield warning(
            "KD304",
            f"method dist correlates over the rows of a batch, and training.batch_size is {subject.recipe.training.batch_size}; "
            "take 16 or more",
        )


def gradient_is_clipped(subject: Subject) -> Iterator[Finding]:
    """A clip that never clips."""
    norm = subject.recipe.training.max_grad_norm
    if norm == float("inf") or norm > 1e4:
        yield warning(
            "KD305", f"training.max_grad_norm is {norm:g}: the gradient is never clipped; 1.0 is usual"
        )


def soft_labels_weigh_something(subject: Subject) -> Iterator[Finding]:
    """Temperature and weights against each other."""
    for method in subject.recipe.methods:
        if not isinstance(method, KDOptions):
            continue
        if method.kd_weight * method.temperature**2 < 0.01 * method.ce_weight:
            yield warning(
                "KD306",
                f"method.kd_weight * temperature^2 is {method.kd_weight * method.temperature**2:.3g} beside "
                f"method.ce_weight {method.ce_weight:g}: the teacher hardly counts",
            )
        if method.kd_weight == 0 and method.ce_weight == 0:
            yield warning(
                "KD307", "method.kd_weight and method.ce_weight are both 0: nothing teaches the classes"
            )


def layers_meet(subject: Subject) -> Iterator[Finding]:
    """Which layers are compared."""
    teacher = subject.teacher
    needs = [method.needs() for method in subject.methods]
    pairs = [pair for need in needs for pair in (*need.layers, *need.tokens)]
    if not pairs or teacher is None:
        return
    layers = shape_of(teacher.model.config).layers
    own = subject.recipe.student.layers
    mapped = any(getattr(one, "layer_map", ()) for one in subject.recipe.methods)
    if not mapped and subject.recipe.student.path is None and layers % own:
        yield warning(
            "KD308",
            f"the teacher's {layers} layers are no multiple of the student's {own}: layers are paired as {pairs}; "
            "name method.layer_map if you mean others",
        )
    elif own == 1 and named(subject, "pkd") is not None:
        yield info(
            "KD309",
            "method pkd leaves the topmost pair out, and a student of one layer has no other: it is kept",
        )
    else:
        yield info("KD310", f"layers compared, student and teacher: {pairs}")


def tokens_meet(subject: Subject) -> Iterator[Finding]:
    """CKD compares the i-th token of one tokenizer with the i-th of another."""
    recipe, teacher = subject.recipe, subject.teacher
    if not subject.task.stores_sequences or teacher is None:
        return
    ours, theirs = (
        rows.texts if isinstance(rows, PairRows) else rows
        for rows in (subject.student_rows(1 << 20), subject.teacher_rows(1 << 20))
    )
    ratio = float((ours.lengths / theirs.lengths).median())
    if not 0.8 < ratio < 1.25:
        yield warning(
            "KD311",
            f"method ckd compares tokens place by place, and the student needs {ratio:.2f} times the teacher's tokens for a row: "
            "token 100 of one is not token 100 of the other; take student.vocab_size nearer to the teacher's vocabulary",
        )
    limits = (recipe.student.max_length, teacher.max_length)
    cut = (ours.lengths > limits[0]) | (theirs.lengths > limits[1])
    if subject.data.focus and limits[0] != limits[1] and float(cut.double().mean()) > 0.2:
        yield warning(
            "KD312",
            f"method ckd compares tokens place by place, and {float(cut.double().mean()):.0%} of the rows are cut around "
            f"{subject.data.focus}, to {limits[0]} tokens for the student and {limits[1]} for the teacher: they begin at "
            "different places; set teacher.max_length to student.max_length",
        )
    inserted = len(subject.task.inserted(subject.tokenizer))
    if inserted:
        yield warning(
            "KD313",
            f"method ckd compares tokens place by place, and the student reads {inserted} inserted tokens of its own: all "
            "others are that far off; set student.insert to []",
        )
