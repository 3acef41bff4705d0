"""The converters of the study's data sets: what comes out, and every way in which the files can be wrong."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from kdtrain.cli import main
from kdtrain.data.benchmarks import convert_bigclonebench, convert_cubert, convert_devign
from kdtrain.data.handlers import CLASSES
from kdtrain.errors import KdtrainError
from kdtrain.recipe import DataSection
from kdtrain.tasks.classification.splits import load_classification

FUNCTIONS = [{"idx": str(i), "func": f"int f{i}(int x)\n{{\n    return x + {i};\n}}"} for i in range(6)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def devign(tmp_path: Path) -> Path:
    folder = tmp_path / "devign"
    folder.mkdir()
    for split, count in (("train", 5), ("valid", 2), ("test", 3)):
        rows = [{"func": FUNCTIONS[i]["func"], "target": i % 2, "idx": i} for i in range(count)]
        with lzma.open(folder / f"{split}.jsonl.xz", "wt") as file:
            file.write(jsonl(rows))
    return folder


@pytest.fixture
def clones(tmp_path: Path) -> Path:
    folder = tmp_path / "clones"
    folder.mkdir()
    (folder / "data.jsonl").write_text(jsonl(FUNCTIONS))
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("0\t1\t1\n2\t3\t0\n")
    return folder


def test_devign(devign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "devign", str(devign), "--output", str(tmp_path / "out")]) == 0
    assert "{'train': 5, 'valid': 2, 'test': 3}" in capsys.readouterr().out
    data = load_classification(DataSection(path=str(tmp_path / "out")))
    assert (data.classes, data.metric, data.pairs) == (("safe", "vulnerable"), "accuracy", False)
    assert data.train.texts[1] == "int f1(int x) { return x + 1; }"
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0]
    kept = convert_devign(devign, tmp_path / "kept", keep_whitespace=True)
    assert kept["labels"]["test"] == {"safe": 2, "vulnerable": 1}
    assert "\n" in load_classification(DataSection(path=str(tmp_path / "kept"))).train.texts[0]


def test_devign_as_codexglue_hands_it_out(tmp_path: Path) -> None:
    functions = [
        {"project": "qemu", "commit_id": "", "target": i % 2, "func": f["func"]}
        for i, f in enumerate(FUNCTIONS)
    ]
    (tmp_path / "function.json").write_text(json.dumps(functions))
    for split, numbers in (("train", "0\n2\n4\n"), ("valid", "1\n"), ("test", "5\n3\n")):
        (tmp_path / f"{split}.txt").write_text(numbers)
    convert_devign(tmp_path, tmp_path / "out")
    data = load_classification(DataSection(path=str(tmp_path / "out")))
    assert data.train.labels.tolist() == [0, 0, 0] and data.test.labels.tolist() == [1, 1]
    (tmp_path / "test.txt").write_text("6\n")
    with pytest.raises(KdtrainError, match=r"test.txt:1 must be an entry number below 6, got '6'"):
        convert_devign(tmp_path, tmp_path / "other")


def test_clones_are_pairs_out_of_a_table(clones: Path, tmp_path: Path) -> None:
    about = convert_bigclonebench(clones, tmp_path / "out")
    assert about["rows"] == {"train": 2, "valid": 2, "test": 2} and about["metric"] == "f1"
    data = load_classification(DataSection(path=str(tmp_path / "out")))
    assert data.pairs and data.classes == ("different", "clone")
    assert data.train.seconds is not None
    assert (data.train.texts[1], data.train.seconds[1]) == (
        "int f2(int x) { return x + 2; }",
        "int f3(int x) { return x + 3; }",
    )
    assert data.train.labels.tolist() == [1, 0]
    assert (
        len((tmp_path / "out" / "functions.jsonl").read_text().splitlines()) == 4
    )  # the others are in no pair


def test_a_share_keeps_the_test_whole(clones: Path, tmp_path: Path) -> None:
    pairs = "".join(f"{i % 6}\t{(i * 5 + 1) % 6}\t{i % 2}\n" for i in range(400))
    for split in ("train", "valid", "test"):
        (clones / f"{split}.txt").write_text(pairs)
    (clones / "data.jsonl").write_text(jsonl(FUNCTIONS))
    about = convert_bigclonebench(clones, tmp_path / "out", share=0.5)
    assert about["rows"]["test"] == 400 and 0 < about["rows"]["train"] < 400
    with pytest.raises(KdtrainError, match=r"--share must lie in \(0, 1\], got 0"):
        convert_bigclonebench(clones, tmp_path / "out", share=0)


def test_cubert(tmp_path: Path) -> None:
    code = "def f(d):\n    try:\n        return d[1]\n    except __HOLE__:\n        pass\n"
    rows = jsonl([{"function": code, "label": "KeyError", "info": "x"}])
    (tmp_path / "train.jsontxt-00000-of-00002").write_text(rows)
    (tmp_path / "train.jsontxt-00001-of-00002").write_text(rows)
    (tmp_path / "dev.jsontxt-00000-of-00001").write_text(rows)
    with gzip.open(tmp_path / "eval.jsontxt.gz", "wt") as file:
        file.write(rows)
    (tmp_path / "test.jsonl").write_text(rows)
    about = convert_cubert(tmp_path, tmp_path / "out")
    assert about["rows"] == {"train": 2, "valid": 2, "test": 1}
    data = load_classification(DataSection(path=str(tmp_path / "out")))
    assert data.focus == "__HOLE__" and data.classes == CLASSES and "\n" in data.train.texts[0]
    (tmp_path / "test.jsonl").write_text(jsonl([{"function": code, "label": "MyError"}]))
    with pytest.raises(
        KdtrainError,
        match=r"test.jsonl:1 must hold function and a label out of the 20 classes, got label 'MyError'",
    ):
        convert_cubert(tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"target": 1}, "train.jsonl:1 has no func"),
        ({"func": " \n", "target": 1}, "train.jsonl:1 has an empty func"),
        ({"func": "x", "target": 2}, "train.jsonl:1 has the label 2, which must be 0 or 1"),
        ({"func": "x"}, "train.jsonl:1 has the label None"),
    ],
)
def test_wrong_defect_rows(devign: Path, tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    (devign / "train.jsonl").write_text(jsonl([row]))
    with pytest.raises(KdtrainError, match=sentence):
        convert_devign(devign, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0\t9\t1\n", "train.txt:1 names the id '9', which the code table lacks"),
        ("0\t1\n", "train.txt:1 has the label None, which must be 0 or 1"),
        ("0\t1\tx\n", "train.txt:1 has the label 'x'"),
    ],
)
def test_wrong_pairs(clones: Path, tmp_path: Path, line: str, sentence: str) -> None:
    (clones / "train.txt").write_text(line)
    with pytest.raises(KdtrainError, match=sentence):
        convert_bigclonebench(clones, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_files(
    devign: Path, clones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clones / "data.jsonl").unlink()
    assert main(["data", "bigclonebench", str(clones), "--output", str(tmp_path / "out")]) == 2
    assert "has no functions.jsonl and no data.jsonl" in capsys.readouterr().err
    whole = (devign / "test.jsonl.xz").read_bytes()
    (devign / "test.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KdtrainError, match=r"cannot read .*test.jsonl.xz"):
        convert_devign(devign, tmp_path / "out")


def test_an_id_that_the_table_of_a_folder_lacks(clones: Path, tmp_path: Path) -> None:
    convert_bigclonebench(clones, tmp_path / "out")
    (tmp_path / "out" / "valid.jsonl").write_text(jsonl([{"id1": "0", "id2": "77", "label": 1}]))
    with pytest.raises(
        KdtrainError, match=r"valid.jsonl:1 names the id '77' in column 'id2', which the code table lacks"
    ):
        load_classification(DataSection(path=str(tmp_path / "out")))


def test_pairs_in_plain_files_and_a_limit(tmp_path: Path) -> None:
    rows = [{"a": f"x = {i}", "b": f"y = {i}", "same": i % 2} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    path = str(tmp_path / "rows.jsonl")
    recipe = DataSection(
        train=path, valid=path, text="a", second="b", label="same", classes=("no", "yes"), limit=7
    )
    data = load_classification(recipe)
    assert len(data.train) == 7 and len(data.valid) == 20 and data.pairs
    assert data.train.seconds is not None
    for a, b, label in zip(data.train.texts, data.train.seconds, data.train.labels.tolist(), strict=True):
        assert rows[int(a.split()[-1])] == {"a": a, "b": b, "same": label}
