"""The study's three data sets as they are handed out, turned into data set folders.

- Defect detection: Devign in CodeXGLUE's form, `function.json` with `train.txt`, `valid.txt`, `test.txt`, or one JSONL file
  a split with `func` and `target`.
- Clone detection: BigCloneBench in CodeXGLUE's form, `data.jsonl` (or `functions.jsonl`) with `idx` and `func`, and pairs as
  `train.txt` with three columns or `pairs_train.jsonl` with `id1`, `id2`, `label`.
- Exception classification: CuBERT's files, JSON lines with `function` and `label`, any number of files a split.

Every file may be compressed (`.xz`, `.gz`). Texts of the first two have their white space collapsed, as CodeXGLUE's own
programs do before they tokenize; line breaks carry meaning in Python and stay in the third.
"""

import gzip
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdtrain.data.handlers import CLASSES, HOLE
from kdtrain.errors import KdtrainError
from kdtrain.files import json_object, write_atomic, write_json

SPLITS = ("train", "valid", "test")
OPENERS = {".xz": lzma.open, ".gz": gzip.open}
CUBERT_NAMES = {"train": ("train",), "valid": ("valid", "dev", "eval"), "test": ("test",)}


def convert_devign(source: Path, output: Path, *, keep_whitespace: bool = False) -> dict[str, Any]:
    """Defect detection in C: accuracy first; class 1 is vulnerable. Gives what dataset.json says."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if (source / "function.json").exists():
        functions = _read_json(source / "function.json")
        for split in SPLITS:
            rows[split] = [
                _defect(f"{source / 'function.json'}, entry {i}", functions[i], keep_whitespace)
                for i in _numbers(source / f"{split}.txt", len(functions))
            ]
    else:
        for split in SPLITS:
            lines = read_lines(find_file(source, f"{split}.jsonl"))
            rows[split] = [_defect(place, row, keep_whitespace) for place, row in lines]
    about = {"name": "devign", "classes": ["safe", "vulnerable"], "metric": "accuracy"}
    return write_dataset(output, rows, {**about, "text": "code", "label": "label"})


def convert_bigclonebench(
    source: Path, output: Path, *, keep_whitespace: bool = False, share: float = 1.0
) -> dict[str, Any]:
    """Clone detection in Java: F1 first; class 1 is a clone. `share` keeps that part of train and valid, by a hash.

    The study kept a tenth of both and all of test.
    """
    if not 0 < share <= 1:
        raise KdtrainError(f"--share must lie in (0, 1], got {share}")
    table = {}
    names = ("functions.jsonl", "data.jsonl")
    for place, row in read_lines(find_file(source, *names)):
        if "idx" not in row or not isinstance(row.get("func"), str):
            raise KdtrainError(f"{place} must hold idx and func (columns: {', '.join(row)})")
        table[str(row["idx"])] = clean(row["func"], keep_whitespace)
    rows = {}
    for split in SPLITS:
        path = find_file(source, f"pairs_{split}.jsonl", f"{split}.txt")
        kept = share if split != "test" else 1.0
        rows[split] = [pair for pair in _pairs(path, table) if _fraction(pair) < kept]
    used = {pair[name] for pairs in rows.values() for pair in pairs for name in ("id1", "id2")}
    functions = [{"id": name, "code": text} for name, text in table.items() if name in used]
    about = {"name": "bigclonebench", "classes": ["different", "clone"], "metric": "f1"}
    columns = {"text": "id1", "second": "id2", "label": "label", "table": "functions.jsonl"}
    return write_dataset(output, rows, {**about, **columns}, {"functions": functions})


def convert_cubert(source: Path, output: Path) -> dict[str, Any]:
    """Exception classification in Python, 20 classes, accuracy first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, names in CUBERT_NAMES.items():
        paths = sorted(
            path
            for path in source.glob("*")
            if path.is_file() and path.name.startswith(names) and "json" in path.name
        )
        if not paths:
            raise KdtrainError(
                f"{source} has no {split} files: names that begin with {' or '.join(names)} and hold json"
            )
        rows[split] = []
        for path in paths:
            for place, row in read_lines(path):
                code, label = row.get("function"), row.get("label")
                if not isinstance(code, str) or label not in CLASSES:
                    raise KdtrainError(
                        f"{place} must hold function and a label out of the 20 classes, got label {label!r}"
                    )
                rows[split].append({"code": code, "label": CLASSES.index(label)})
    about = {"name": "cubert-exceptions", "classes": list(CLASSES), "metric": "accuracy", "focus": HOLE}
    return write_dataset(output, rows, {**about, "text": "code", "label": "label"})


def clean(text: str, keep_whitespace: bool) -> str:
    """The text, with every run of white space made one blank unless it is kept."""
    return text if keep_whitespace else " ".join(text.split())


def find_file(folder: Path, *names: str) -> Path:
    """The first of the names that exists, compressed or not."""
    for name in names:
        for suffix in ("", *OPENERS):
            if (folder / f"{name}{suffix}").exists():
                return folder / f"{name}{suffix}"
    raise KdtrainError(
        f"{folder} has no {' and no '.join(names)} (nor one that ends in {' or '.join(OPENERS)})"
    )


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not empty, with its place."""
    opener = OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise KdtrainError(f"cannot read {path}: {error}") from None


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and object."""
    for place, line in read_text(path):
        yield place, json_object(place, line)


def write_dataset(
    output: Path,
    rows: dict[str, list[dict[str, Any]]],
    about: dict[str, Any],
    tables: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Write one JSONL file a split and dataset.json last, so that a folder that holds it is whole; give the latter."""
    content = hashlib.sha256()
    for name, part in {**(tables or {}), **rows}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        content.update(text.encode())
        write_atomic(output / f"{name}.jsonl", text)
    counts = {split: Counter(about["classes"][row["label"]] for row in part) for split, part in rows.items()}
    description = {
        "task": "classification",
        **about,
        "content_hash": content.hexdigest()[:16],
        "rows": {name: len(part) for name, part in rows.items()},
        "labels": {split: dict(count.most_common()) for split, count in counts.items()},
    }
    write_json(output / "dataset.json", description)
    return description


def _defect(place: str, row: Any, keep_whitespace: bool) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("func"), str):
        raise KdtrainError(f"{place} has no func")
    if not row["func"].strip():
        raise KdtrainError(f"{place} has an empty func")
    return {"code": clean(row["func"], keep_whitespace), "label": _binary(place, row.get("target"))}


def _binary(place: str, value: Any) -> int:
    if value not in (0, 1, "0", "1"):
        raise KdtrainError(f"{place} has the label {value!r}, which must be 0 or 1")
    return int(value)


def _pairs(path: Path, table: dict[str, str]) -> Iterator[dict[str, Any]]:
    source: Iterable[tuple[str, dict[str, Any]]]
    if ".jsonl" in path.name:
        source = read_lines(path)
    else:
        source = (
            (place, dict(zip(("id1", "id2", "label"), line.split(), strict=False)))
            for place, line in read_text(path)
        )
    for place, row in source:
        for name in ("id1", "id2"):
            if str(row.get(name)) not in table:
                raise KdtrainError(f"{place} names the id {row.get(name)!r}, which the code table lacks")
        label = _binary(place, row.get("label"))
        yield {"id1": str(row["id1"]), "id2": str(row["id2"]), "label": label}


def _fraction(pair: dict[str, Any]) -> float:
    digest = hashlib.sha256(f"{pair['id1']} {pair['id2']}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def _read_json(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KdtrainError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, list):
        raise KdtrainError(f"{path} must hold a list of functions, got {type(content).__name__}")
    return content


def _numbers(path: Path, count: int) -> Iterator[int]:
    for place, line in read_text(path):
        word = line.strip()
        if not word.isdigit() or int(word) >= count:
            raise KdtrainError(f"{place} must be an entry number below {count}, got {word!r}")
        yield int(word)
