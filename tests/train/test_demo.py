"""The demo end to end on a small tree of code, and the stages that make a teacher."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kdtrain.cli import main
from kdtrain.commands.demo import next_commands
from kdtrain.data.handlers import CLASSES, HOLE
from kdtrain.demo.classification import DemoPlan, demo
from kdtrain.demo.make_teacher import FINE_TUNING, PRETRAINING, SHAPE, TeacherPlan, make_teacher
from kdtrain.evaluation.linear_baseline import around, linear_baselines

TINY = SHAPE.replaced(vocab_size=400, hidden_size=32, layers=2, heads=2, intermediate_size=64, max_length=48)
KINDS = {
    "KeyError": "table[key{n}]",
    "IndexError": "rows[{n}]",
    "ImportError": "__import__('m{n}')",
    "OSError": "open('f{n}').read()",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 modules; the statement in the `try` tells the type."""
    root = tmp_path_factory.mktemp("code")
    for n in range(160):
        error, statement = list(KINDS.items())[n % 4]
        lines = "\n".join(f"        value_{j} = other_{n * 5 + j}(table, {n * j})" for j in range(4))
        code = f"def read_{n}(table, rows):\n    try:\n{lines}\n        return {statement.format(n=n)}\n"
        (root / f"m{n}.py").write_text(f"{code}    except {error}:\n        raise ValueError({n})\n")
    return root


@pytest.fixture(scope="module")
def made(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small teacher made from the tree."""
    folder = tmp_path_factory.mktemp("made")
    pretraining = PRETRAINING.replaced(max_steps=40, eval_steps=20)
    plan = TeacherPlan(TINY, pretraining, FINE_TUNING.replaced(eval_steps=None))
    make_teacher(folder / "work", folder / "teacher", plan=plan, trees=[tree])
    return folder


def test_a_made_teacher_is_half_precision_and_says_what_it_is(made: Path) -> None:
    described = json.loads((made / "teacher" / "teacher.json").read_text())
    assert described["pretraining"]["steps"] == 40
    assert described["pretraining"]["name_loss"] < 0.9 * math.log(described["vocabulary"]), (
        "it learned nothing"
    )
    assert described["pretraining"]["rows"]["train"] > described["pretraining"]["functions"]
    assert described["test"]["rows"] > 0 and described["valid"]["loss"] < 1.1 * math.log(len(CLASSES))
    model = AutoModelForSequenceClassification.from_pretrained(made / "teacher")
    assert model.dtype == torch.float16 and model.config.id2label[1] == CLASSES[1]


def test_the_demo_tells_the_whole_story_and_a_second_call_only_reports(
    made: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = DemoPlan()
    plan = DemoPlan(
        student=base.student.replaced(vocab_size=400, hidden_size=16, heads=2, intermediate_size=32),
        teacher_layers=(2,),
        methods={**base.methods, "kd_features": base.methods["kd_features"].replaced(layer_map=((2, 2),))},
        training=base.training.replaced(max_steps=20, eval_steps=10),
        teacher=made / "teacher",
        trees=(tree,),
    )
    report = demo(tmp_path / "demo", plan=plan, seeds=2)
    for part in (
        "linear: tokens, whole function",
        "linear: tokens and pairs, 300 characters",
        "| teacher |",
        "labels only (FT)",
        "student, KD |",
        "KD + features",
        "paired",
    ):
        assert part in report
    entries = json.loads((tmp_path / "demo" / "report.json").read_text())["models"]
    teacher, student = entries["teacher"], entries["student, KD"]
    assert student["parameters"] < teacher["parameters"] and student["bytes"] > 0
    assert 0 < student["accuracy_interval"][0] <= student["accuracy"] <= student["accuracy_interval"][1] <= 1
    assert len(student["accuracy_of_seeds"]) == 2 and student["train_seconds"] > 0
    for picture in ("accuracy_intervals.png", "learning_curves.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    again = demo(tmp_path / "demo", plan=plan, seeds=2)
    assert "already done" in capsys.readouterr().err
    rows = [[cell for cell in text.splitlines() if cell.startswith("| student")] for text in (report, again)]
    accuracies = [[row.split("|")[4] for row in part] for part in rows]
    assert accuracies[0] == accuracies[1]
    commands = next_commands(tmp_path / "demo" / "runs" / "kd-0").splitlines()[1:]
    assert len(commands) == 3
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "kdtrain" and main(words) == 0, command
    assert (tmp_path / "demo" / "runs" / "kd-0-again" / "summary.json").exists()


def test_linear_baselines_beat_chance_where_tokens_tell() -> None:
    texts = [f"a{i % 7} b{i % 5} {'red' if i % 2 else 'blue'} {HOLE} tail" for i in range(80)]
    labels = torch.arange(80) % 2
    scores = linear_baselines(texts[:60], labels[:60], texts[60:], HOLE)
    assert len(scores) == 3
    for logits in scores.values():
        assert (logits.argmax(dim=1) == labels[60:]).all()
    assert around("x" * 1000 + HOLE + "y" * 1000, HOLE, 600).count("x") == 300


def test_pairs_tell_what_single_tokens_do_not() -> None:
    """The class is the order of two tokens: single tokens are at chance, pairs are right."""
    texts = [f"f ( a , b ) n{i % 9}" if i % 2 else f"f ( b , a ) n{i % 9}" for i in range(120)]
    labels = torch.arange(120) % 2
    scores = linear_baselines(texts[:80], labels[:80], texts[80:], None)
    right = {name: (logits.argmax(dim=1) == labels[80:]).float().mean() for name, logits in scores.items()}
    assert right["tokens and pairs, whole function"] == 1.0
    assert right["tokens, whole function"] < 0.8


def test_the_command_builds_a_data_set_and_refuses_a_missing_folder(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "exceptions", "--output", str(tmp_path / "data"), str(tree)]) == 0
    assert "from 160 files" in capsys.readouterr().out
    assert main(["data", "exceptions", "--output", str(tmp_path / "other"), str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
