"""The command: what a user sees, above all when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain.cli import main
from kdtrain.recipe import ClassificationRecipe, Section, save_recipe
from kdtrain.tasks.recipes import RECIPES


@pytest.fixture
def saved(recipe: ClassificationRecipe, tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    save_recipe(recipe.replaced(output=str(tmp_path / "run")), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_train_evaluate_and_compare(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", str(saved), "--training.max_steps", "4", "--training.gradient_accumulation_steps=2"])
        == 0
    )
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["training"]["steps"] == 4
    assert main(["evaluate", str(run), "--against", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy minus run: +0.0%  95 % interval [+0.0%, +0.0%]" in printed
    assert "latency of one row" in printed
    assert json.loads((run / "evaluation.json").read_text())["rows"] == 40


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--training.learning_rte", "1"],
            "unknown recipe key training.learning_rte; did you mean training.learning_rate?",
        ),
        (["--method.name", "kd"], "method kd needs a teacher; set teacher.path to a folder or hub id"),
        (["--method.name", "kd5"], "method.name must be one of ft, kd, kd_features, dist, pkd"),
        (["--data.path", "./nowhere"], "nowhere is no data set: it has no dataset.json"),
        (["--teacher.path", "./nowhere"], "teacher.path: there is no folder ./nowhere"),
        (["--teacher.path", "runs/none/student"], "teacher.path: there is no folder runs/none/student"),
        (["--student.tokenizer", "./nowhere"], "student.tokenizer: there is no folder ./nowhere"),
        (["--training.num_train_epochs", "0"], "training.num_train_epochs must be greater than 0, got 0"),
    ],
)
def test_user_errors_are_one_line_and_code_2(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["train", str(saved), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kdtrain: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not (tmp_path / "run" / "student").exists()


def test_wrong_data_is_told_before_anything_is_written(
    saved: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"code": "x", "label": 0}\n{"code": "y", "label": 9}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"task: classification\nmethod: {{name: ft}}\ndata: {{train: {rows}, valid: {rows}, classes: [a, b]}}\noutput: {tmp_path}/run\n"
    )
    assert main(["train", str(saved)]) == 2
    assert "rows.jsonl:2 has label 9; the 2 classes are numbered 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_as_a_process_a_wrong_key_needs_neither_torch_nor_a_traceback(saved: Path) -> None:
    code = "import sys; from kdtrain.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    words = [sys.executable, "-c", code, "train", str(saved), "--sead", "1"]
    found = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("kdtrain: unknown recipe key sead; did you mean seed?")
    assert "Traceback" not in found.stderr


def test_unknown_words_of_other_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "somewhere", "--fast"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "STUDY"], "this is a study of many runs; start it with kdtrain study"),
        (["cache", "STUDY"], "which stores its teachers' outputs itself; start it with kdtrain study"),
        (
            ["demo", "--task", "code-lm", "--seeds", "2"],
            "--seeds and --train-teacher are for --task exceptions",
        ),
        (["demo", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["demo", "--site-packages", "."], "add --train-teacher"),
    ],
)
def test_words_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("task: study\n")
    assert main([str(study) if word == "STUDY" else word for word in words]) == 2
    assert sentence in capsys.readouterr().err


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for task, kind in RECIPES.items():
        own = printed.partition(f"task {task}, ")[2].partition("fields of a recipe of task")[0]
        for section, field in kind.model_fields.items():
            inner = field.annotation
            if not (isinstance(inner, type) and issubclass(inner, Section)):
                assert f"--{section} (" in own, (task, section)
                continue
            for name in inner.model_fields:
                assert f"--{section}.{name} (" in own, (task, section, name)


def test_help_of_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    printed = capsys.readouterr().out
    assert "--tasks (needed)" in printed and "--common (none)" in printed and "--seeds ([0, 1, 2])" in printed


def test_cache_without_a_teacher(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", str(saved)]) == 2
    assert "names no teacher; set teacher.path" in capsys.readouterr().err
