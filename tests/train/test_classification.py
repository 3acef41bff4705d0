"""Classification data: folders, plain files, unlabelled rows, and every way in which a file can be wrong."""

import json
import shutil
from pathlib import Path

import pytest

from kdtrain.errors import KdtrainError
from kdtrain.outputs import IGNORED
from kdtrain.recipe import DataSection
from kdtrain.tasks.classification.splits import load_classification
from tests.train.conftest import CLASSES, FOCUS


@pytest.fixture
def broken(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy data set, to be spoiled."""
    shutil.copytree(toy, tmp_path / "data")
    return tmp_path / "data"


def test_folder(toy: Path) -> None:
    data = load_classification(DataSection(path=str(toy)))
    assert (data.name, data.classes, data.focus) == ("toy", CLASSES, FOCUS)
    assert [len(rows) for rows in (data.train, data.valid, data.test, data.unlabelled)] == [240, 32, 40, 24]
    assert set(data.train.labels.tolist()) == {0, 1, 2}
    assert set(data.unlabelled.labels.tolist()) == {IGNORED}
    assert all(len(key) == 32 for key in data.train.keys())  # noqa: SIM118


def test_fingerprint_follows_the_content_only(toy: Path, broken: Path) -> None:
    fingerprint = load_classification(DataSection(path=str(toy))).fingerprint()
    assert load_classification(DataSection(path=str(broken))).fingerprint() == fingerprint
    lines = (broken / "test.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    lines[-1] = json.dumps({**row, "label": (row["label"] + 1) % 3})
    (broken / "test.jsonl").write_text("\n".join(lines))
    assert load_classification(DataSection(path=str(broken))).fingerprint() != fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_plain_files_with_a_column_mapping(tmp_path: Path, suffix: str) -> None:
    rows = [("x = 1", "bad"), ("y = 2", "good"), ("z, = 3", "bad")]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("func,target\n" + "".join(f'"{code}",{label}\n' for code, label in rows))
    else:
        path.write_text("".join(json.dumps({"func": code, "target": label}) + "\n" for code, label in rows))
    recipe = DataSection(
        train=str(path), valid=str(path), text="func", label="target", classes=("good", "bad")
    )
    data = load_classification(recipe)
    assert data.train.texts == [code for code, _ in rows]
    assert data.train.labels.tolist() == [1, 0, 1]
    assert data.test.texts == data.valid.texts  # no test file: the validation rows stand in
    assert len(data.unlabelled) == 0


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"code": "x", "label": 0', "train.jsonl:2 is not a line of JSON"),
        ("\udcff", "train.jsonl:2 is not a line of JSON"),
        ("[1]", "train.jsonl:2 must hold a JSON object, got list"),
        ('{"code": "x", "label": 3}', "train.jsonl:2 has label 3; the 3 classes are numbered 0 to 2"),
        ('{"code": "x", "label": -1}', "train.jsonl:2 has label -1; the 3 classes are numbered 0 to 2"),
        ('{"code": "x", "label": "Eror"}', "train.jsonl:2 has label 'Eror'"),
        ('{"code": "x", "label": 1.0}', "train.jsonl:2 has label 1.0"),
        ('{"code": "x", "label": [1]}', "train.jsonl:2 has label [1]; the 3 classes"),
        ('{"code": "x\\ud800", "label": 1}', "train.jsonl:2 holds half of a surrogate pair in column 'code'"),
        ('{"code": "x"}', "train.jsonl:2 has no label in column 'label' (columns: code)"),
        ('{"code": " \\n", "label": 0}', "train.jsonl:2 has no text in column 'code' (columns: code, label)"),
        ('{"text": "x", "label": 0}', "train.jsonl:2 has no text in column 'code' (columns: text, label)"),
    ],
)
def test_unreadable_rows_are_named(broken: Path, line: str, sentence: str) -> None:
    first = (broken / "train.jsonl").read_text().splitlines()[0]
    (broken / "train.jsonl").write_bytes(f"{first}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(KdtrainError) as caught:
        load_classification(DataSection(path=str(broken)))
    assert sentence in str(caught.value)


def test_unreadable_plain_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"code": "x", "label": 0}\n{"code": "x", \n')
    with pytest.raises(KdtrainError, match=r"rows.jsonl:2 is not a line of JSON"):
        load_classification(DataSection(train=str(path), valid=str(path), classes=("a", "b")))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", b"", "the train split of .* has no rows"),
        ("rows.jsonl", b'{"code": "\xe9", "label": 0}\n', "rows.jsonl:1 is not a line of JSON"),
        ("rows.csv", b"", "cannot be read as csv"),
        ("rows.csv", b"code,label\n", "cannot be read as csv"),
        ("rows.csv", b"code,label\nx,0\ny,\nz,1\n", "row 2 has no label in column 'label'"),
        ("rows.parquet", b"", "cannot be read as parquet"),
        ("rows.parquet", b"PAR1 junk", "cannot be read as parquet"),
    ],
)
def test_plain_files_that_hold_nothing(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(KdtrainError, match=sentence):
        load_classification(DataSection(train=str(path), valid=str(path), classes=("a", "b")))
    with pytest.raises(KdtrainError, match=r"there is no such file"):
        load_classification(DataSection(train=str(tmp_path / "a.csv"), valid=str(path), classes=("a", "b")))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_odd_file_names_and_texts_that_look_like_dates(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "rows [a-z]* of ü"
    folder.mkdir()
    path = folder / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("code,label\n2020-01-01,a\n2021-01-01,b\n")
    else:
        path.write_text('{"code": "2020-01-01", "label": "a"}\r\n\n{"code": "2021-01-01", "label": "b"}\n\n')
    data = load_classification(DataSection(train=str(path), valid=str(path), classes=("a", "b")))
    assert data.train.texts == ["2020-01-01", "2021-01-01"]
    assert data.train.labels.tolist() == [0, 1]


def test_a_number_that_is_another_class_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("code,label\nx,0\ny,1\n")
    with pytest.raises(KdtrainError, match=r"row 1 has label 0, and 0 is also the name of class 1"):
        load_classification(DataSection(train=str(path), valid=str(path), classes=("1", "0")))
    data = load_classification(DataSection(train=str(path), valid=str(path), classes=("0", "1")))
    assert data.train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("classes", [None, "abc", ["a"], ["a", "a", "b"]])
def test_classes_of_a_folder_are_different_names(broken: Path, classes: object) -> None:
    about = json.loads((broken / "dataset.json").read_text())
    (broken / "dataset.json").write_text(json.dumps({**about, "classes": classes}))
    with pytest.raises(KdtrainError, match=r"classes must be a list of different names, at least two"):
        load_classification(DataSection(path=str(broken)))
    (broken / "dataset.json").write_text("[]")
    with pytest.raises(KdtrainError, match=r"dataset.json must hold a JSON object, got list"):
        load_classification(DataSection(path=str(broken)))


def test_missing_and_empty_files(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"is no data set: it has no dataset.json"):
        load_classification(DataSection(path=str(tmp_path)))
    with pytest.raises(KdtrainError, match=r"there is no such file"):
        load_classification(DataSection(train="no.jsonl", valid="no.jsonl", classes=("a", "b")))
    with pytest.raises(KdtrainError, match=r"must end in one of .jsonl, .csv, .parquet"):
        load_classification(DataSection(train="no.txt", valid="no.txt", classes=("a", "b")))
    (broken / "valid.jsonl").write_text("")
    with pytest.raises(KdtrainError, match=r"the valid split of toy has no rows"):
        load_classification(DataSection(path=str(broken)))
    (broken / "valid.jsonl").unlink()
    with pytest.raises(KdtrainError, match=r"cannot read .*valid.jsonl: No such file or directory"):
        load_classification(DataSection(path=str(broken)))
