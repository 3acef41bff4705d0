"""Figures: metrics against numbers worked out by hand, intervals against theory, and a run measured twice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdtrain.errors import KdtrainError
from kdtrain.evaluation.classification import compare_runs, evaluate_run
from kdtrain.evaluation.measure import bootstrap_interval, paired_difference
from kdtrain.methods import method_options
from kdtrain.recipe import ClassificationRecipe
from kdtrain.run import run
from kdtrain.summary import Summary
from kdtrain.tasks.classification.metrics import classification_metrics


def test_metrics_by_hand() -> None:
    logits = torch.tensor(
        [[4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    )
    labels = torch.tensor([0, 2, 3, 3])
    teacher = torch.eye(4)[[0, 1, 1, 0]]
    metrics = classification_metrics(logits, labels, teacher)
    assert metrics["accuracy"] == 0.5
    assert metrics["top3"] == 0.75
    # per class: 0 has precision 1/2, recall 1; 1 and 2 have F1 0; 3 has precision 1, recall 1/2
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0 + 0 + 2 / 3) / 4)
    assert metrics["agreement"] == 0.5
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert metrics["loss"] == pytest.approx(float(expected))
    assert "agreement" not in classification_metrics(logits, labels)


def test_bootstrap_interval_covers_as_it_should() -> None:
    values = (np.arange(1000) % 4 == 0).astype(float)
    low, high = bootstrap_interval(values)
    half_width = 1.96 * np.sqrt(0.25 * 0.75 / 1000)
    assert low == pytest.approx(0.25 - half_width, abs=0.004)
    assert high == pytest.approx(0.25 + half_width, abs=0.004)
    assert bootstrap_interval(values) == (low, high)


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    generator = np.random.default_rng(0)
    first = generator.random(800) < 0.7
    second = first.copy()
    second[:40] = False
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(first[:40].mean() * 40 / 800)
    assert 0 < low < difference < high
    whole = bootstrap_interval(first.astype(float))
    assert high - low < 0.7 * (whole[1] - whole[0])


def test_run_is_measured_again_with_the_same_result(
    distillation: ClassificationRecipe, tmp_path: Path
) -> None:
    folder, other = tmp_path / "one", tmp_path / "two"
    summary = run(distillation.replaced(output=str(folder), method=method_options("kd")))
    run(distillation.replaced(output=str(other), seed=1))
    found = evaluate_run(folder)
    for name in ("accuracy", "top3", "macro_f1", "agreement", "accuracy_interval"):
        assert found[name] == summary.metrics[name], name
    assert found["parameters"] == summary.student["parameters"]
    assert found["bytes"] == summary.student["bytes"] > 0
    assert 0 < found["latency_ms"] < 1000
    assert evaluate_run(folder, "valid")["accuracy"] == summary.valid["accuracy"]
    difference, low, high = compare_runs(folder, other)
    assert difference == pytest.approx(summary.metrics["accuracy"] - Summary.load(other).metrics["accuracy"])
    assert low <= difference <= high


def test_moved_cache_costs_the_measured_rows(
    distillation: ClassificationRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is asked about the rows of the split, and for their logits alone."""
    cache = tmp_path / "cache"
    teacher = distillation.teacher.replaced(cache=str(cache))
    run(distillation.replaced(teacher=teacher, output=str(tmp_path / "run")))
    wanted = evaluate_run(tmp_path / "run")["agreement"]
    cache.rename(tmp_path / "moved")
    capsys.readouterr()
    assert evaluate_run(tmp_path / "run")["agreement"] == wanted
    assert "teacher cache: 40 rows (logits: 40 x 3 float32), " in capsys.readouterr().err


def test_other_texts_with_the_same_labels_make_no_pairs(
    recipe: ClassificationRecipe, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts in another order under the same labels are refused where both runs say which they measured."""
    data, one, two = (tmp_path / name for name in ("data", "one", "two"))
    shutil.copytree(toy, data)
    short = recipe.replaced(
        data=recipe.data.replaced(path=str(data)), training=recipe.training.replaced(max_steps=1)
    )
    run(short.replaced(output=str(one)))
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    moved = [
        {**line, "code": other["code"]} for line, other in zip(lines, lines[1:] + lines[:1], strict=True)
    ]
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))
    run(short.replaced(output=str(two)))
    with pytest.raises(
        KdtrainError, match="different test rows, which make no pairs; compare runs of one data"
    ):
        compare_runs(one, two)
    compare_runs(one, two, "valid")
    path = one / "predictions" / "test.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        KdtrainError, match=r"test.safetensors is damaged: it has changed since it was written"
    ):
        compare_runs(one, two)
    capsys.readouterr()
    evaluate_run(one)
    assert f"the content of the data has changed since {one} was trained" in capsys.readouterr().err
    evaluate_run(two)
    assert "has changed" not in capsys.readouterr().err


def test_teacher_stands_in_the_summary(
    distillation: ClassificationRecipe, teacher: Path, tmp_path: Path
) -> None:
    """A fine-tuned student with a teacher beside it: agreement is known, training never saw the teacher."""
    summary = run(distillation.replaced(output=str(tmp_path / "run"), method=method_options("ft")))
    assert summary.teacher is not None
    alone = Summary.load(teacher.parent)
    assert summary.teacher["test"]["accuracy"] == alone.metrics["accuracy"]
    assert summary.teacher["parameters"] == alone.student["parameters"]
    assert 0 <= summary.metrics["agreement"] <= 1
    assert not (tmp_path / "run" / "projection.safetensors").exists()


def test_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"holds no finished run: it needs student/ and recipe.yaml"):
        evaluate_run(tmp_path)
    with pytest.raises(KdtrainError, match=r"holds no finished run: .*test.safetensors is missing"):
        compare_runs(tmp_path, tmp_path)
