"""kdtrain evaluate on language models: the figures of the run, recomputed from its files, and a comparison of two."""

import json
from pathlib import Path

import numpy as np
import pytest

from kdtrain.cli import main
from kdtrain.evaluation.measure import bootstrap_interval
from kdtrain.methods import method_options
from kdtrain.recipe import LanguageRecipe
from kdtrain.run import run
from kdtrain.summary import Summary


def test_runs_are_measured_and_compared(
    language_distillation: LanguageRecipe,
    language_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The saved student gives what the run measured in training, also next to its teacher."""
    teacher, student = language_teacher.parent, tmp_path / "student"
    training = language_distillation.training.replaced(max_steps=6, eval_steps=6)
    recipe = language_distillation.replaced(
        training=training, method=method_options("kd", temperature=1.0, ce_weight=0.5), output=str(student)
    )
    run(recipe)
    assert main(["evaluate", str(student), "--against", str(teacher)]) == 2
    captured = capsys.readouterr()
    assert f"{teacher} has not been measured yet; run kdtrain evaluate {teacher} first" in captured.err
    assert not captured.out, "told before anything is measured"
    assert main(["evaluate", str(teacher)]) == 0
    assert "teacher" not in capsys.readouterr().out, "nothing to agree with"
    assert main(["evaluate", str(student), "--against", str(teacher)]) == 0
    out = capsys.readouterr().out
    found, known = ({}, {})
    for folder, name in ((teacher, "teacher"), (student, "student")):
        found[name] = json.loads((folder / "evaluation.json").read_text())
        known[name] = Summary.load(folder).valid
        for metric, value in known[name].items():
            assert found[name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
        low, high = found[name]["loss_interval"]
        assert low < found[name]["loss"] < high
        assert found[name]["latency_ms"] > 0 and found[name]["generated_per_second"] > 0
    difference = found["student"]["loss"] - found["teacher"]["loss"]
    assert difference > 0.1 and f"loss minus run: {difference:+.4f}" in out
    assert f"agreement with teacher   {found['student']['agreement']:.1%}" in out
    assert main(["evaluate", str(student), "--split", "test"]) == 2
    assert "has no test split" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no finished run" in capsys.readouterr().err


def test_rows_of_one_token_are_measured(language_recipe: LanguageRecipe, tmp_path: Path) -> None:
    """A student that reads one token at a time is asked to continue it, too."""
    training = language_recipe.training.replaced(max_steps=2, eval_steps=2)
    data = language_recipe.data.replaced(max_length=1)
    run(language_recipe.replaced(data=data, training=training, output=str(tmp_path)))
    assert main(["evaluate", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["generated_per_second"] > 0


def test_interval_weighs_rows_by_their_tokens() -> None:
    """Rows that all have one loss leave no doubt, whatever their lengths; rows that differ do."""
    counts = np.array([1.0, 10.0, 100.0])
    assert bootstrap_interval(2.5 * counts, counts) == pytest.approx((2.5, 2.5))
    low, high = bootstrap_interval(np.array([1.0, 20.0, 300.0]), counts)
    assert 1.0 <= low < 2.0 < high <= 3.0
