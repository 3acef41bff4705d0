"""The whole story on one machine in minutes: data, teacher, plain and distilled students, one table, two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from kdtrain.console import say
from kdtrain.data.exceptions import build_exceptions
from kdtrain.data.tokens import tokenize
from kdtrain.demo.report import Entry, write_report
from kdtrain.evaluation.linear_baseline import linear_baselines
from kdtrain.files import folder_bytes
from kdtrain.methods import method_options
from kdtrain.models.loading import parameter_count
from kdtrain.models.teachers import load_teacher
from kdtrain.recipe import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    MethodOptions,
    StudentSection,
    TeacherSection,
)
from kdtrain.run import run
from kdtrain.summary import Summary
from kdtrain.tasks.classification.metrics import latency_ms
from kdtrain.tasks.classification.splits import ClassificationData, load_classification

SHIPPED_TEACHER = Path(__file__).parent.parent / "teacher"

TITLES = {"ft": "student, labels only (FT)", "kd": "student, KD", "kd_features": "student, KD + features"}


STUDENT = StudentSection(
    vocab_size=3000, hidden_size=96, layers=2, heads=4, intermediate_size=384, max_length=64, dropout=0.0
)
TRAINING = ClassificationTraining(max_steps=2000, batch_size=32, learning_rate=2e-3, eval_steps=500)


@dataclass(frozen=True)
class DemoPlan:
    """What the demo trains. The defaults are sized for two cores and five minutes."""

    student: StudentSection = STUDENT
    teacher_layers: tuple[int, ...] = (4,)
    methods: Mapping[str, MethodOptions] = field(
        default_factory=lambda: {
            "ft": method_options("ft"),
            "kd": method_options("kd", temperature=2.0, kd_weight=1.0, ce_weight=0.25),
            "kd_features": method_options(
                "kd_features",
                temperature=2.0,
                kd_weight=1.0,
                ce_weight=0.25,
                feature_weight=3.0,
                layer_map=((2, 4),),
            ),
        }
    )
    # The same number of steps for every method: what differs is what a step learns from.
    training: ClassificationTraining = TRAINING
    teacher: Path = SHIPPED_TEACHER
    trees: tuple[Path, ...] = ()
    """folders to take the Python code from, in place of what is installed"""


def demo(
    output: Path,
    *,
    plan: DemoPlan | None = None,
    seeds: int = 1,
    train_teacher: bool = False,
    site_packages: Sequence[Path] = (),
) -> str:
    """Do everything that is not done yet below `output`; give the report, which is also written there.

    Args:
        output: folder of the demo. Finished parts are recognised, so a second call only reports.
        plan: what to train, where the defaults will not do.
        seeds: students of each method; the table shows their mean.
        train_teacher: make the teacher anew in place of the shipped one (about an hour on two cores).
        site_packages: further folders of installed packages to train a new teacher on.
    """
    plan = plan or DemoPlan()
    say("1/4 data: exception classification from the Python code installed here")
    if not (output / "data" / "dataset.json").exists():
        build_exceptions(output / "data", plan.trees)
    data = load_classification(DataSection(path=str(output / "data")))
    teacher = plan.teacher
    if train_teacher:
        from kdtrain.demo.make_teacher import make_teacher

        say("2/4 teacher: a new one")
        teacher = output / "teacher"
        make_teacher(output / "teacher-work", teacher, trees=plan.trees, site_packages=site_packages)
    else:
        say("2/4 teacher: the one that ships with kdtrain (kdtrain/teacher/teacher.json says what it is)")
    say("3/4 students: labels only, KD, KD + features")
    runs = {
        name: [run(student_recipe(plan, name, seed, output, teacher)) for seed in range(seeds)]
        for name in plan.methods
    }
    say("4/4 linear baselines and report")
    entries = [*baseline_entries(data), teacher_entry(teacher, data, output)]
    entries += [student_entry(name, summaries, output) for name, summaries in runs.items()]
    return write_report(
        output, data, entries, {TITLES[name]: output / "runs" / f"{name}-0" for name in plan.methods}
    )


def student_recipe(
    plan: DemoPlan, method: str, seed: int, output: Path, teacher: Path
) -> ClassificationRecipe:
    """The recipe of one student. All share the tokenizer of the first and the teacher's stored outputs."""
    first = output / "runs" / f"{next(iter(plan.methods))}-0"
    is_first = first.name == f"{method}-{seed}"
    return ClassificationRecipe(
        data=DataSection(path=str(output / "data")),
        student=plan.student if is_first else plan.student.replaced(tokenizer=str(first / "student")),
        teacher=TeacherSection(
            path=str(teacher), cache=str(output / "teacher-cache"), layers=plan.teacher_layers
        ),
        method=(plan.methods[method],),
        training=plan.training,
        output=str(output / "runs" / f"{method}-{seed}"),
        seed=seed,
    )


def baseline_entries(data: ClassificationData) -> list[Entry]:
    """The linear classifiers."""
    scores = linear_baselines(data.train.texts, data.train.labels, data.test.texts, data.focus)
    return [Entry(f"linear: {name}", [logits], data.test.labels) for name, logits in scores.items()]


def teacher_entry(path: Path, data: ClassificationData, output: Path) -> Entry:
    """The teacher: its stored outputs for the test rows, its size, and its speed measured here."""
    teacher = load_teacher(str(path), data.classes)
    stored = load_file(next((output / "runs").glob("*/predictions/test.safetensors")))
    rows = tokenize(data.test.texts, teacher.tokenizer, teacher.max_length, data.focus)
    return Entry(
        "teacher",
        [stored["teacher_logits"]],
        data.test.labels,
        parameters=parameter_count(teacher.model),
        size=folder_bytes(path),
        latency_ms=latency_ms(teacher.model, rows),
    )


def student_entry(method: str, summaries: Sequence[Summary], output: Path) -> Entry:
    """All seeds of one method."""
    stored = [load_file(output / "runs" / one.name / "predictions" / "test.safetensors") for one in summaries]
    return Entry(
        TITLES[method],
        [one["logits"] for one in stored],
        stored[0]["labels"],
        teacher_logits=stored[0]["teacher_logits"],
        parameters=summaries[0].student["parameters"],
        size=summaries[0].student["bytes"],
        latency_ms=min(one.student["latency_ms"] for one in summaries),
        seconds=sum(one.training["seconds"] for one in summaries) / len(summaries),
    )
