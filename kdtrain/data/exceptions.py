"""Exception classification: which exception type does this handler catch?

The task of CuBERT (Kanade et al., ICML 2020) and of arXiv 2508.15423: a Python function in which the type of one
`except` clause is hidden; 20 classes. Built here from the Python code installed on the machine, or from any tree.

How a row is made:
- one row for each handler that names a single type of the 20; the innermost function around it is the text. An
  attribute counts by its last name (`requests.HTTPError` is `HTTPError`);
- the syntax tree says where the type stands, and only that expression becomes `__HOLE__`. Every other mention of an
  exception in the function (other handlers, `raise`, comments) stays, as it would for a programmer;
- exact and near duplicates (Jaccard similarity of five-token shingles >= 0.7) are removed function by function, with
  the type names in place. When copies lie on several sides, the one on the test side is kept;
- a module's side is a hash of its dotted name (`kdtrain.data.sources.split_of`): no file is on two sides, and a module
  is on the same side on every machine and under every version;
- handlers of the training side that name another type, or several, have no label among the 20. They are kept, with
  the type hidden, as unlabelled rows: a teacher can score them, so they serve as a transfer set.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from joblib import Parallel, delayed

from kdtrain.console import progress, say
from kdtrain.data.handlers import (
    CLASSES,
    HOLE,
    Function,
    functions_with_names,
    masked,
    may_hold_a_label,
)
from kdtrain.data.near_duplicates import clusters
from kdtrain.data.sources import (
    SPLITS,
    Distribution,
    SourceFile,
    installed_sources,
    split_of,
    tree_sources,
)
from kdtrain.errors import KdtrainError
from kdtrain.files import write_atomic, write_json


def build_exceptions(
    output: Path, trees: Sequence[Path] = (), *, site_packages: Sequence[Path] = ()
) -> dict[str, object]:
    """Write the data set below `output` and return what `dataset.json` says of it.

    Without `trees` the sources are the standard library and the permissively licensed distributions installed
    here and in the folders `site_packages`; with `trees`, every Python file below those folders instead. The files
    are train.jsonl, valid.jsonl, test.jsonl, unlabelled.jsonl and dataset.json; dataset.json is written last, so a
    folder that holds it is whole.
    """
    files, distributions = source_files(trees, site_packages)
    functions = collect_functions(files)
    kept = without_duplicates(functions)
    rows = rows_by_split(kept)
    empty = [side for side in SPLITS if not rows[side]]
    if empty:
        raise KdtrainError(
            f"the {len(files)} Python files found give no {empty[0]} row (a typed handler of one of the 20 classes "
            "in a module of that side); name a larger tree"
        )
    return _write(output, rows, files, distributions, duplicates=len(functions) - len(kept))


def source_files(
    trees: Sequence[Path], site_packages: Sequence[Path]
) -> tuple[list[SourceFile], list[Distribution]]:
    """The Python files to read, and the distributions they came with when they are installed ones."""
    missing = [str(folder) for folder in (*trees, *site_packages) if not folder.is_dir()]
    if missing:
        raise KdtrainError(f"there is no folder {missing[0]} to take Python code from")
    if trees:
        return [file for tree in trees for file in tree_sources(tree)], []
    return installed_sources(site_packages)


def collect_functions(files: Sequence[SourceFile], *, raises: bool = False) -> list[Function]:
    """The functions of all files, read by every core; with `raises`, those with a `raise` count too.

    Files that cannot be read or parsed are left out, and one sentence says how many and why the first.
    """
    found: list[Function] = []
    skipped: list[str] = []
    jobs = (delayed(read_functions)(file, raises=raises) for file in files)
    results = cast(Iterator[list[Function] | str], Parallel(n_jobs=-1, return_as="generator")(jobs))
    with progress(len(files), "reading Python code", unit="files") as bar:
        for result in results:
            if isinstance(result, str):
                skipped.append(result)
            else:
                found += result
            bar.update()
    if skipped:
        say(
            f"left out {len(skipped)} of {len(files)} files that this Python cannot read, the first: {skipped[0]}"
        )
    return found


def read_functions(file: SourceFile, *, raises: bool = False) -> list[Function] | str:
    """The functions of one file, or the reason why it has none to give."""
    try:
        source = file.path.read_bytes().replace(b"\r\n", b"\n")
        if not (raises and b"raise" in source) and not may_hold_a_label(source):
            return []
        return functions_with_names(source, file.module, raises=raises)
    except (OSError, SyntaxError, UnicodeDecodeError, RecursionError, ValueError) as error:
        return f"{file.path}: {error}"


def without_duplicates(functions: Sequence[Function]) -> list[Function]:
    """One function of each cluster of near duplicates: the first one on the test side, else valid, else train."""
    preference = {side: rank for rank, side in enumerate(reversed(SPLITS))}
    ordered = sorted(functions, key=lambda one: (preference[split_of(one.module)], one.module, one.text))
    first_of = clusters([one.text for one in ordered])
    return [one for index, one in enumerate(ordered) if first_of[index] == index]


def rows_by_split(functions: Sequence[Function]) -> dict[str, list[dict[str, object]]]:
    """The rows of `train`, `valid`, `test` and `unlabelled`, each sorted by row id."""
    rows: dict[str, dict[str, dict[str, object]]] = {name: {} for name in (*SPLITS, "unlabelled")}
    for function in functions:
        side = split_of(function.module)
        for hole in function.holes:
            code = masked(function, hole)
            row: dict[str, object] = {"id": hashlib.sha256(code.encode()).hexdigest()[:16], "code": code}
            row["module"] = function.module
            if hole.label is not None:
                rows[side][str(row["id"])] = row | {"label": hole.label}
            elif side == "train":
                rows["unlabelled"][str(row["id"])] = row
    return {name: [found[key] for key in sorted(found)] for name, found in rows.items()}


def _write(
    output: Path,
    rows: dict[str, list[dict[str, object]]],
    files: Sequence[SourceFile],
    distributions: Sequence[Distribution],
    duplicates: int,
) -> dict[str, object]:
    content = hashlib.sha256()
    for name, part in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        content.update(text.encode())
        write_atomic(output / f"{name}.jsonl", text)
    description: dict[str, object] = {
        "task": "classification",
        "name": "exceptions",
        "text": "code",
        "label": "label",
        "classes": list(CLASSES),
        "focus": HOLE,
        "content_hash": content.hexdigest()[:16],
        "rows": {name: len(part) for name, part in rows.items()},
        "labels": {
            side: dict(Counter(CLASSES[int(str(row["label"]))] for row in rows[side]).most_common())
            for side in SPLITS
        },
        "files_read": len(files),
        "duplicate_functions_removed": duplicates,
        "sources": [asdict(one) for one in distributions],
    }
    write_json(output / "dataset.json", description)
    return description
