"""The demo end to end on a small tree of code, and the stages that make a teacher."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kdtrain.cli import main
from kdtrain.data.handlers import CLASSES, HOLE, functions_with_names
from kdtrain.demo import DemoPlan, demo
from kdtrain.floor import around, bag_of_tokens
from kdtrain.make_teacher import FINE_TUNING, SHAPE, TeacherPlan, make_teacher
from kdtrain.pretrain import IGNORED, hidden_name_windows, mask_tokens
from kdtrain.tokenizers import train_tokenizer

TINY = replace(SHAPE, vocab_size=400, hidden_size=32, layers=2, heads=2, intermediate_size=64, max_length=48)
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
    plan = TeacherPlan(TINY, 40, replace(FINE_TUNING, evaluate_every=None))
    make_teacher(folder / "work", folder / "teacher", plan=plan, trees=[tree])
    return folder


def test_a_made_teacher_is_half_precision_and_says_what_it_is(made: Path) -> None:
    described = json.loads((made / "teacher" / "teacher.json").read_text())
    assert described["pretraining"]["steps"] == 40
    assert described["pretraining"]["name_loss"] < 0.9 * math.log(described["vocabulary"]), (
        "it learned nothing"
    )
    assert described["pretraining"]["windows"] > described["pretraining"]["functions"]
    assert described["test"]["rows"] > 0 and described["valid"]["loss"] < 1.1 * math.log(len(CLASSES))
    model = AutoModelForSequenceClassification.from_pretrained(made / "teacher")
    assert model.dtype == torch.float16 and model.config.id2label[1] == CLASSES[1]


def test_the_demo_tells_the_whole_story_and_a_second_call_only_reports(
    made: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = DemoPlan()
    plan = DemoPlan(
        student=replace(base.student, vocab_size=400, hidden_size=16, heads=2, intermediate_size=32),
        teacher_layers=(2,),
        methods={**base.methods, "kd_features": replace(base.methods["kd_features"], layer_map=((2, 2),))},
        training=replace(base.training, max_steps=20, evaluate_every=10),
        teacher=made / "teacher",
        trees=(tree,),
    )
    report = demo(tmp_path / "demo", plan=plan, seeds=2)
    for part in (
        "floor: bag of tokens",
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
    for picture in ("accuracy_against_size.png", "learning_curves.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    again = demo(tmp_path / "demo", plan=plan, seeds=2)
    assert "already done" in capsys.readouterr().err
    rows = [[cell for cell in text.splitlines() if cell.startswith("| student")] for text in (report, again)]
    accuracies = [[row.split("|")[4] for row in part] for part in rows]
    assert accuracies[0] == accuracies[1]


def test_the_floor_beats_chance_where_tokens_tell() -> None:
    texts = [f"a{i % 7} b{i % 5} {'red' if i % 2 else 'blue'} {HOLE} tail" for i in range(80)]
    labels = torch.arange(80) % 2
    scores = bag_of_tokens(texts[:60], labels[:60], texts[60:], HOLE)
    for logits in scores.values():
        assert (logits.argmax(dim=1) == labels[60:]).all()
    assert around("x" * 1000 + HOLE + "y" * 1000, HOLE).count("x") == 300


def test_windows_hide_the_name_and_masks_spare_special_tokens() -> None:
    code = "def f(a):\n    try:\n        g(a)\n    except KeyError:\n        raise TypeError(a)\n    raise OSError\n"
    functions = functions_with_names(code.encode(), "m", raises=True)
    tokenizer = train_tokenizer([code] * 4, vocab_size=330, max_length=64, focus=HOLE)
    rows, names = hidden_name_windows(functions, tokenizer, 64)
    assert len(rows) == 2, "the handler, and the first raise of the function"
    pieces = [str(tokenizer.decode(name)).strip() for name in names]
    assert "KeyError".startswith(pieces[0]) and "TypeError".startswith(pieces[1]) and all(pieces)
    ids, _ = rows.batch(torch.tensor([0, 1]))
    assert (ids == tokenizer.get_vocab()[HOLE]).sum(dim=1).tolist() == [1, 1]
    corrupted, labels = mask_tokens(ids, tokenizer, torch.Generator().manual_seed(0))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert (labels[special] == IGNORED).all() and (corrupted[special] == ids[special]).all()
    assert (labels != IGNORED).any() and (corrupted[labels == IGNORED] == ids[labels == IGNORED]).all()


def test_the_command_builds_a_data_set_and_refuses_a_missing_folder(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "exceptions", "--output", str(tmp_path / "data"), str(tree)]) == 0
    assert "from 160 files" in capsys.readouterr().out
    assert main(["data", "exceptions", "--output", str(tmp_path / "other"), str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
