"""A study end to end on tiny models: the grid, what is shared, a kill in the middle, the report; and its statistics."""

import csv
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification

from kdtrain.cli import main
from kdtrain.errors import KdtrainError
from kdtrain.recipe import ClassificationRecipe
from kdtrain.run import run
from kdtrain.study.plan import Cell, study_from_dict, unfold
from kdtrain.study.statistics import deviation, metric_of_sums, paired_test, row_counts
from kdtrain.study.work import is_finished
from tests.support.commands import Program


def content(toy: Path, teacher: Path, output: Path) -> dict[str, Any]:
    """2 students x 2 methods x 2 seeds of a few steps."""
    shape = {"vocab_size": 320, "hidden_size": 16, "layers": 2}
    return {
        "task": "study",
        "tasks": {"toy": {"data": {"path": str(toy)}, "teacher": {"path": str(teacher)}}},
        "students": {
            "small-roberta": {**shape, "heads": 2, "intermediate_size": 32},
            "small-bigru": {**shape, "architecture": "bigru"},
        },
        "methods": {
            "ft": {"name": "ft"},
            "ckd": {"name": "ckd", "window": 2, "training": {"max_steps": 5}},
        },
        "common": {"student": {"max_length": 40}, "training": {"max_steps": 4, "batch_size": 16}},
        "seeds": [0, 1],
        "workers": 2,
        "output": str(output),
    }


def test_cells_are_recipes(toy: Path, teacher: Path, tmp_path: Path) -> None:
    cells = unfold(study_from_dict(content(toy, teacher, tmp_path)))
    assert len(cells) == 8
    assert [cell.name for cell in cells[:3]] == [
        "toy-small-roberta-ft-0",
        "toy-small-roberta-ft-1",
        "toy-small-roberta-ckd-0",
    ]
    ckd = cells[2].recipe
    assert (ckd.method_name, ckd.training.max_steps, ckd.training.batch_size) == ("ckd", 5, 16)
    assert (ckd.student.max_length, ckd.student.hidden_size, ckd.seed) == (40, 16, 0)
    assert cells[0].recipe.training.max_steps == 4


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": {}}, "a study needs at least one of its tasks"),
        ({"students": {1: {}}}, "names of students must be text, got 1: put it into quotes"),
        ({"seeds": [1, 1]}, r"seeds must be different numbers, at least one, got \[1, 1\]"),
        ({"workers": 0}, "workers must be greater than 0, got 0"),
        ({"worker": 2}, "unknown recipe key worker; did you mean workers"),
        ({"task": "language"}, "kdtrain study reads recipes of task study, got task: language"),
        ({"tasks": {"a": {"date": {}}}}, "tasks.a has the unknown key date"),
        ({"tasks": {"a": 3}}, "tasks.a must be a section with fields, got 3"),
        (
            {"methods": {"m": {"name": "ft", "windw": 3}}},
            r"the study's cell \(toy, small-roberta, m\), from .*methods\.m: unknown recipe key method.windw",
        ),
    ],
)
def test_wrong_studies(
    toy: Path, teacher: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KdtrainError, match=sentence):
        unfold(study_from_dict({**content(toy, teacher, tmp_path), **change}))
    with pytest.raises(KdtrainError, match="methods is missing: by name: fields of the method section"):
        study_from_dict({"task": "study", "tasks": {"a": {}}, "students": {"s": {}}})


def test_a_killed_study_goes_on_and_reports(toy: Path, teacher: Path, tmp_path: Path) -> None:
    """kill -9 after the first finished run; the same command then finishes only what is left."""
    output = tmp_path / "study"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content(toy, teacher, output), sort_keys=False))
    command = ["kdtrain", "study", str(tmp_path / "study.yaml")]
    process = Program(command)
    deadline = time.monotonic() + 200
    while not list(output.glob("runs/*/summary.json")) and time.monotonic() < deadline:
        assert process.returncode is None, "the study was over before it could be killed"
        time.sleep(0.02)
    process.kill()
    time.sleep(3)  # the workers see that their parent is gone
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/summary.json")}
    assert 1 <= len(done) < 8

    stopped = Program([*command, "--workers", "1"])  # and Ctrl-C: it ends, and its worker with it
    while "side by side" not in stopped.errors() and time.monotonic() < deadline + 60:
        time.sleep(0.02)
    time.sleep(1)
    os.kill(stopped.pid, signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, errors
    assert errors.rstrip().endswith("kdtrain: interrupted; run the same command to resume"), errors
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/summary.json")}
    assert len(done) < 8

    again = Program([*command, "--workers", "1"])
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"{len(done)} of 8 runs are already done" in errors
    assert {path: path.stat().st_mtime_ns for path in done} == done
    check_report(output, printed)
    assert len(list((output / "tokenizers").iterdir())) == 1
    manifest = json.loads((output / "teacher-cache" / "toy" / "manifest.json").read_text())
    states = {f"{kind}.{layer}" for kind in ("states", "tokens") for layer in (0, 2, 3)}
    assert set(manifest["tensors"]) == {"logits", *states}
    for folder in output.glob("runs/*"):
        assert not list((folder / "checkpoints").glob("step-*"))
    AutoModelForSequenceClassification.from_pretrained(output / "runs" / "toy-small-bigru-ckd-1" / "student")


def test_a_run_of_another_teacher_is_not_finished(distillation: ClassificationRecipe, tmp_path: Path) -> None:
    """The teacher was trained again, and its stored outputs were made anew as the cache's sentence advises."""
    teacher = distillation.teacher.replaced(cache=str(tmp_path / "cache"))
    training = distillation.training.replaced(max_steps=1)
    recipe = distillation.replaced(teacher=teacher, training=training, output=str(tmp_path / "run"))
    fingerprint = run(recipe).data["fingerprint"]
    cell = Cell("toy", "small", "kd", recipe)
    assert is_finished(cell, fingerprint)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "teacher_weights": "another"}))
    assert not is_finished(cell, fingerprint)


def check_report(output: Path, printed: str) -> None:
    """The table, the files and that they say the same."""
    assert printed.strip() == (output / "report.md").read_text().strip()
    lines, runs = (
        list(csv.DictReader((output / name).read_text().splitlines())) for name in ("table.csv", "runs.csv")
    )
    assert len(lines) == 4 and len(runs) == 8
    line = next(one for one in lines if one["student"] == "small-bigru" and one["method"] == "ckd")
    own = [
        float(one["test_accuracy"])
        for one in runs
        if one["student"] == "small-bigru" and one["method"] == "ckd"
    ]
    assert float(line["mean"]) == pytest.approx(np.mean(own))
    assert float(line["deviation"]) == pytest.approx(np.std(own, ddof=1))
    base = [
        float(one["test_accuracy"])
        for one in runs
        if one["student"] == "small-bigru" and one["method"] == "ft"
    ]
    assert float(line["difference"]) == pytest.approx(np.mean(own) - np.mean(base), abs=1e-9)
    assert float(line["difference_low"]) <= float(line["difference"]) <= float(line["difference_high"])
    assert next(one for one in lines if one["method"] == "ft")["p"] == ""
    assert f"{100 * np.mean(own):.1f} ± {100 * np.std(own, ddof=1):.1f}" in printed
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 2 and not re.search(r"(src|href)=.?http", page), "one file, nothing to fetch"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in ("metric_over_size.svg", "retained_over_size.svg"):
        assert ">parameters" in (output / name).read_text(), "text stays text"
    costs = json.loads((output / "costs.json").read_text())
    assert {cost["student"] for cost in costs} == {"small-roberta", "small-bigru", "teacher"}
    assert all(cost["latency_ms"] > 0 and cost["rows_per_second"] > 0 for cost in costs)


def test_runs_that_fail_do_not_stop_the_others(
    toy: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = content(toy, teacher, tmp_path / "study")
    study["methods"] = {
        "ft": {"name": "ft"},
        "bad": {"name": "ft", "training": {"learning_rate": 1e38, "warmup_ratio": 0, "logging_steps": 1}},
    }
    study["students"].pop("small-bigru")
    study.update(seeds=[0], workers=1)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", str(tmp_path / "study.yaml")]) == 2
    assert "1 of 2 runs failed, the first, toy-small-roberta-bad-0: the loss is" in capsys.readouterr().err
    assert (tmp_path / "study" / "runs" / "toy-small-roberta-ft-0" / "summary.json").exists()


def test_a_method_without_its_teacher(
    toy: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = content(toy, teacher, tmp_path / "study")
    study["tasks"]["toy"].pop("teacher")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", str(tmp_path / "study.yaml")]) == 2
    told = capsys.readouterr().err
    assert (
        "cell (toy, small-roberta, ckd), from common, tasks.toy, students.small-roberta and methods.ckd: "
        in told
    )
    assert "method ckd needs a teacher; set teacher.path" in told


@pytest.mark.parametrize("metric", ["accuracy", "f1", "top3"])
def test_sums_give_the_metric(metric: str) -> None:
    generator = np.random.default_rng(1)
    classes = 2 if metric == "f1" else 6
    logits, labels = generator.normal(size=(50, classes)), generator.integers(0, classes, 50)
    found = float(metric_of_sums(row_counts(logits, labels, metric).sum(axis=0)))
    predicted = logits.argmax(1)
    if metric == "f1":
        assert found == pytest.approx(f1_score(labels, predicted))
    elif metric == "accuracy":
        assert found == pytest.approx((predicted == labels).mean())
    else:
        assert found == pytest.approx(
            np.mean([label in np.argsort(-row)[:3] for row, label in zip(logits, labels, strict=True)])
        )


def test_the_paired_test_tells_a_difference_from_none() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 800)

    def seeds(accuracy: float) -> list[np.ndarray]:
        made = []
        for _ in range(3):
            predicted = np.where(generator.random(800) < accuracy, labels, 1 - labels)
            made.append(row_counts(np.eye(2)[predicted], labels, "accuracy"))
        return made

    low, same, high = seeds(0.70), seeds(0.70), seeds(0.80)
    clear, none = paired_test(high, low), paired_test(same, low)
    assert clear.p < 0.001 and clear.low > 0.05 and clear.mean == pytest.approx(0.1, abs=0.03)
    assert none.p > 0.05 and none.low < 0 < none.high
    equal = paired_test(low, low)
    assert (equal.mean, equal.low, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)


def test_deviation() -> None:
    assert deviation([1.0]) == 0.0
    assert deviation([1.0, 3.0]) == pytest.approx(2**0.5)
