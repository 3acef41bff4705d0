"""The language-model demo end to end, on a small tree of code and in seconds."""

import json
from pathlib import Path

import pytest

from kdtrain.demo.code_lm import LanguageDemoPlan, language_demo
from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageStudentSection


def plan(tree: Path) -> LanguageDemoPlan:
    return LanguageDemoPlan(
        vocab_size=400,
        train_characters=40_000,
        valid_characters=4_000,
        max_length=64,
        teacher=LanguageStudentSection(hidden_size=32, layers=2, heads=2, intermediate_size=64),
        student=LanguageStudentSection(hidden_size=16, layers=1, heads=1, intermediate_size=32),
        batch_size=4,
        teacher_steps=12,
        steps=6,
        trees=(tree,),
    )


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for i in range(60):
        body = "".join(
            f"    def method_{j}(self, a, b):\n        return a + {j} * b\n\n" for j in range(i % 9 + 2)
        )
        (tree / f"module_{i}.py").write_text(
            f'"""Module {i}, of which there are many."""\n\n\nclass Thing{i}:\n{body}'
        )
    text = language_demo(tmp_path / "demo", plan(tree))
    for name in ("teacher", "student, next tokens only (CE)", "student, forward KL", "student, skew KL",
                 "student, forward KL + hidden MSE"):  # fmt: skip
        assert f"| {name} |" in text and f"- {name}: `" in text, name
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    students = [entry for name, entry in report["models"].items() if name != "teacher"]
    assert {entry["training"]["steps"] for entry in students} == {6}
    assert all(0 <= entry["valid"]["agreement"] <= 1 for entry in students)
    assert (tmp_path / "demo" / "learning_curves.png").stat().st_size > 10_000
    capsys.readouterr()
    assert language_demo(tmp_path / "demo", plan(tree)) == text
    assert capsys.readouterr().err.count("already done") == 5


def test_too_little_code_is_told(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(KdtrainError, match="too little Python code was found"):
        language_demo(tmp_path / "demo", plan(tmp_path))
