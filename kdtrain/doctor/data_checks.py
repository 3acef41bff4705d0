"""Checks of a classification run: its rows."""

from collections.abc import Iterator

import torch

from kdtrain.doctor import Finding, error, info, warning
from kdtrain.doctor.subject import Subject
from kdtrain.outputs import IGNORED
from kdtrain.tasks.classification.pairs import PairRows
from kdtrain.tasks.classification.rows import TextRows


def classes_are_there(subject: Subject) -> Iterator[Finding]:
    """Classes that training never shows, and how far the largest gets alone."""
    data = subject.data
    seen = data.train.labels[data.train.labels != IGNORED]
    counts = torch.bincount(seen, minlength=len(data.classes))
    missing = [data.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
    if missing:
        yield warning(
            "KD101",
            f"no training row has the class {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}: "
            "the labels alone cannot teach it; add rows or leave the class out",
        )
    largest = float(torch.bincount(data.test.labels).max() / len(data.test))
    yield info("KD102", f"always naming the largest class is right for {largest:.1%} of the test rows")


def test_rows_are_new(subject: Subject) -> Iterator[Finding]:
    """Rows of valid or test that training shows too, up to white space."""
    data = subject.data

    def plain(rows: TextRows) -> list[str]:
        seconds = rows.seconds or [""] * len(rows)
        return [" ".join(f"{a}\0{b}".split()) for a, b in zip(rows.texts, seconds, strict=True)]

    shown = set(plain(data.train))
    for name, rows in (("valid", data.valid), ("test", data.test)):
        count = sum(text in shown for text in plain(rows))
        if count:
            yield warning(
                "KD103",
                f"{count} of {len(rows)} {name} rows also stand in the training rows; take them out there",
            )


def rows_are_cut(subject: Subject) -> Iterator[Finding]:
    """How much of the rows student and teacher do not see."""
    sides = [("student", subject.student_rows(1 << 20), subject.recipe.student.max_length)]
    if subject.teacher is not None:
        sides.append(("teacher", subject.teacher_rows(1 << 20), subject.teacher.max_length))
    for side, rows, limit in sides:
        lengths = (rows.texts if isinstance(rows, PairRows) else rows).lengths
        share = float((lengths > limit).double().mean())
        if share > 0.2:
            kept = "around the focus marker" if subject.data.focus else "from their beginning"
            yield warning(
                "KD104",
                f"{share:.0%} of the rows are longer than the {limit} tokens the {side} reads and are cut, {kept}; "
                f"half of all have at most {int(lengths.median())} tokens: {side}.max_length",
            )


def focus_is_there(subject: Subject) -> Iterator[Finding]:
    """A marker that no row has: long rows would be cut from their beginning, in silence."""
    focus = subject.data.focus
    if focus is not None and not any(focus in text for text in subject.data.train.all_texts()):
        yield warning("KD105", f"no training row holds the focus marker {focus}, so data.focus does nothing")


def best_is_what_counts(subject: Subject) -> Iterator[Finding]:
    """The metric that chooses the checkpoint."""
    best, metric = subject.recipe.training.metric_for_best_model, subject.data.metric
    if best == "f1" and len(subject.data.classes) != 2:
        yield error(
            "KD106",
            f"training.metric_for_best_model f1 is for two classes, and {subject.data.name} has {len(subject.data.classes)}",
        )
    elif best != metric:
        yield info(
            "KD107",
            f"the best checkpoint is chosen by {best}, and the task is measured by {metric}: training.metric_for_best_model",
        )
