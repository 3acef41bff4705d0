"""The doctor: each known trap, laid on purpose, is named before any training; a good recipe is not scolded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdtrain.cli import main
from kdtrain.doctor import Finding, error, examine, info
from kdtrain.doctor import data_checks as of_data
from kdtrain.doctor import method_checks as of_method
from kdtrain.doctor import teacher_checks as of_teacher
from kdtrain.doctor.classification import CHECKS, examine_recipe
from kdtrain.doctor.subject import Subject
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.recipe import ClassificationRecipe, DataSection, TeacherSection, save_recipe
from kdtrain.tasks.base import SharedInputs


def told(findings: list[Finding], level: str, words: str) -> bool:
    return any(finding.level == level and words in finding.text for finding in findings)


def two_classes(recipe: ClassificationRecipe, folder: Path) -> ClassificationRecipe:
    """The toy task as one of two classes in plain files."""
    assert recipe.data.path is not None
    for name in ("train", "valid", "test"):
        lines = (Path(recipe.data.path) / f"{name}.jsonl").read_text().splitlines()
        rows = [{**row, "label": min(1, row["label"])} for row in map(json.loads, lines)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, valid, test = (str(folder / f"{name}.jsonl") for name in ("train", "valid", "test"))
    data = DataSection(train=train, valid=valid, test=test, classes=("KeyError", "other"), focus="__HOLE__")
    return recipe.replaced(data=data)


def test_a_good_run_has_nothing_wrong(
    distillation: ClassificationRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_recipe(distillation.replaced(output=str(tmp_path / "run")), tmp_path / "recipe.yaml")
    assert main(["doctor", str(tmp_path / "recipe.yaml"), "--student.layers", "3"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[-1].startswith("0 errors")
    # What is suspicious of the toy task is true: short rows repeat, long ones are cut.
    found = [line for line in lines if line.startswith("warning")]
    assert all("also stand in the training rows" in line or "are cut" in line for line in found)
    assert "layers compared, student and teacher: [(1, 1), (2, 2), (3, 3)]" in printed
    assert "the teacher is right for" in printed and "the teacher's outputs take about" in printed
    assert not (tmp_path / "run").exists()


def test_dist_of_two_classes_and_few_rows(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    small = two_classes(recipe, tmp_path).replaced(method=method_options("dist"))
    small = small.replaced(training=small.training.replaced(batch_size=4))
    subject = Subject(small)
    assert told(
        list(of_method.correlation_has_a_gradient(subject)), "warning", "set method.inter_weight to 0"
    )
    assert told(list(of_method.batch_is_large_enough(subject)), "warning", "training.batch_size is 4")
    said = Subject(small.replaced(method=method_options("dist", inter_weight=0.0)))
    assert not list(of_method.correlation_has_a_gradient(said))


def test_a_clip_that_never_clips(recipe: ClassificationRecipe) -> None:
    loose = recipe.replaced(training=recipe.training.replaced(max_grad_norm=float("inf")))
    assert told(list(of_method.gradient_is_clipped(Subject(loose))), "warning", "never clipped")
    assert not list(of_method.gradient_is_clipped(Subject(recipe)))


def test_a_teacher_whose_dropout_stays_on(distillation: ClassificationRecipe) -> None:
    subject = Subject(distillation)
    assert subject.teacher is not None
    assert not list(of_teacher.teacher_answers_alike(subject))
    model: Any = subject.teacher.model
    model.roberta.encoder.layer[0] = Noisy(model.roberta.encoder.layer[0])
    assert told(list(of_teacher.teacher_answers_alike(subject)), "error", "differently each time")


class Noisy(nn.Module):
    """A block with dropout that no eval mode reaches."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return nn.functional.dropout(self.block(*inputs, **options), 0.5, training=True)


def test_a_model_that_reads_padding(
    distillation: ClassificationRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(distillation)
    assert subject.teacher is not None
    assert not list(of_method.loss_ignores_padding(subject))
    model: Any = subject.teacher.model
    forward = model.roberta.forward
    monkeypatch.setattr(
        model.roberta, "forward", lambda *a, **k: forward(*a, **{**k, "attention_mask": None})
    )
    assert told(list(of_teacher.teacher_answers_alike(subject)), "error", "depends on padding")


def test_a_teacher_of_the_other_order(
    distillation: ClassificationRecipe, teacher: Path, tmp_path: Path
) -> None:
    """Two classes the wrong way round are told with the cure; a teacher of another task is told as such."""
    turned = two_classes(distillation, tmp_path)
    subject = Subject(turned, Opened(Subject(turned), teacher))
    subject.__dict__["teacher_logits"] = torch.eye(2)[1 - subject.sample.labels]
    assert told(
        list(of_teacher.teacher_knows_the_task(subject)), "error", "set teacher.class_order to [1, 0]"
    )
    other = Subject(distillation)
    other.__dict__["teacher_logits"] = torch.eye(3)[(other.sample.labels + 1) % 3]
    assert told(list(of_teacher.teacher_knows_the_task(other)), "warning", "is it a teacher of this task")


class Opened(SharedInputs):
    """SharedInputs with a teacher whose class count the recipe does not check."""

    def __init__(self, subject: Subject, teacher: Path) -> None:
        super().__init__()
        from kdtrain.models.teachers import load_teacher
        from tests.train.conftest import CLASSES

        self._data = Subject(subject.recipe).data
        self._teacher = load_teacher(str(teacher), CLASSES)

    def once(self, key: Any, make: Any) -> Any:
        """The data and the teacher, whatever the recipe says of them."""
        own = {"data": self._data, "teacher": self._teacher}
        return own[key[0]] if key[0] in own else super().once(key, make)


def test_rows_of_the_test_in_training_and_classes_that_are_missing(
    recipe: ClassificationRecipe, toy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(toy, folder)
    test = (folder / "test.jsonl").read_text().splitlines()
    keep = [
        line for line in (folder / "train.jsonl").read_text().splitlines() if json.loads(line)["label"] != 2
    ]
    moved = [line for line in test if json.loads(line)["label"] != 2][:3]
    (folder / "train.jsonl").write_text(
        "\n".join([*keep, *(line.replace("\\n", "\\n\\n") for line in moved)])
    )
    subject = Subject(recipe.replaced(data=DataSection(path=str(folder))))
    assert told(
        list(of_data.test_rows_are_new(subject)),
        "warning",
        "3 of 40 test rows also stand in the training rows",
    )
    assert told(list(of_data.classes_are_there(subject)), "warning", "no training row has the class OSError")


def test_a_focus_marker_that_no_row_has(recipe: ClassificationRecipe) -> None:
    assert not list(of_data.focus_is_there(Subject(recipe)))
    other = recipe.replaced(data=recipe.data.replaced(focus="__HOEL__"))
    assert told(list(of_data.focus_is_there(Subject(other))), "warning", "holds the focus marker __HOEL__")


def test_rows_that_are_cut(distillation: ClassificationRecipe) -> None:
    short = distillation.replaced(student=distillation.student.replaced(max_length=16))
    findings = list(of_data.rows_are_cut(Subject(short)))
    assert told(
        findings,
        "warning",
        "longer than the 16 tokens the student reads and are cut, around the focus marker",
    )


def test_weights_layers_and_metric(distillation: ClassificationRecipe) -> None:
    silent = distillation.replaced(method=distillation.method[0].replaced(kd_weight=1e-5, temperature=1.0))
    assert told(
        list(of_method.soft_labels_weigh_something(Subject(silent))),
        "warning",
        "the teacher hardly counts",
    )
    nothing = distillation.replaced(method=distillation.method[0].replaced(kd_weight=0.0, ce_weight=0.0))
    assert told(list(of_method.soft_labels_weigh_something(Subject(nothing))), "warning", "nothing teaches")
    assert told(
        list(of_method.layers_meet(Subject(distillation))), "warning", "no multiple of the student's 2"
    )
    wrong_metric = distillation.replaced(training=distillation.training.replaced(metric_for_best_model="f1"))
    assert told(list(of_data.best_is_what_counts(Subject(wrong_metric))), "error", "f1 is for two classes")


def test_tokens_that_do_not_meet(distillation: ClassificationRecipe) -> None:
    """A student that cuts a text into far more tokens than its teacher does."""
    alike = distillation.teacher.replaced(max_length=distillation.student.max_length)
    ckd = distillation.replaced(method=method_options("ckd"), teacher=alike)
    assert not list(of_method.tokens_meet(Subject(ckd)))
    subject = Subject(ckd)
    rows = subject.student_rows(1 << 20)
    subject.__dict__["student_rows"] = lambda limit: replace(rows, lengths=2 * rows.lengths)
    assert told(list(of_method.tokens_meet(subject)), "warning", "times the teacher's tokens")
    shorter = ckd.replaced(student=ckd.student.replaced(max_length=24))
    assert told(
        list(of_method.tokens_meet(Subject(shorter))),
        "warning",
        "set teacher.max_length to student.max_length",
    )
    shifted = ckd.replaced(student=ckd.student.replaced(insert=("</s>",)))
    assert told(list(of_method.tokens_meet(Subject(shifted))), "warning", "set student.insert to []")


def test_a_cache_larger_than_the_disk(
    distillation: ClassificationRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = distillation.replaced(
        teacher=distillation.teacher.replaced(cache=str(tmp_path / "new" / "cache"))
    )
    assert told(list(of_teacher.cache_fits(Subject(fresh))), "info", "the teacher's outputs take about")
    monkeypatch.setattr(of_teacher.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert told(list(of_teacher.cache_fits(Subject(fresh))), "error", "1.0 kB are free there: give another")


def test_what_cannot_even_start(recipe: ClassificationRecipe) -> None:
    found = examine_recipe(recipe.replaced(method=method_options("kd")))
    assert [finding.level for finding in found] == ["error"] and "needs a teacher" in found[0].text
    found = examine_recipe(recipe.replaced(teacher=TeacherSection(path="./nowhere")))
    assert "there is no folder ./nowhere" in found[0].text


def test_a_check_that_is_refused_is_a_finding() -> None:
    def refused(subject: object) -> list[Finding]:
        raise KdtrainError("no")

    assert list(examine(None, [refused, lambda _: [info("KD102", "yes")]])) == [
        error("KD001", "no"),
        info("KD102", "yes"),
    ]
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)


def test_a_study_and_unknown_tasks(
    toy: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        f"task: study\ntasks: {{toy: {{data: {{path: {toy}}}, teacher: {{path: {teacher}}}}}}}\n"
        "students: {small: {vocab_size: 320, hidden_size: 16, layers: 3, heads: 2, intermediate_size: 32, max_length: 40}}\n"
        "methods: {ft: {name: ft}, loose: {name: ft, training: {max_grad_norm: .inf}}}\n"
    )
    assert main(["doctor", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "warning  KD305  (toy, small, loose) training.max_grad_norm is inf" in printed
    assert main(["doctor", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 0 and found["warnings"] == sum(
        one["level"] == "warning" for one in found["findings"]
    )
    loose = next(one for one in found["findings"] if one["code"] == "KD305")
    assert loose["group"] == "Method and training" and loose["link"].endswith("troubleshooting.md#kd305")
    assert main(["doctor", str(path), "--quiet"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]} == {"warning"}
    path.write_text("task: vision\n")
    assert main(["doctor", str(path)]) == 2
    assert "task must be one of classification, code_lm, masked_lm, study" in capsys.readouterr().err
