"""Which Python source files are installed here, under which licence, and on which side of the split each one lies."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SPLITS = ("train", "valid", "test")
# Cumulative shares of the hash range. Changing them moves modules across sides, and the shipped teacher
# was trained on one side, so they never change without training it anew.
_SPLIT_ENDS = (0.72, 0.80, 1.0)

_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zope|ZPL|Unlicense|CC0|HPND|zlib)\b",
    re.IGNORECASE,
)
_COPYLEFT = re.compile(r"\b(A?L?GPL|GNU|Mozilla|MPL|EUPL|CeCILL|proprietary)", re.IGNORECASE)


@dataclass(frozen=True)
class Distribution:
    """An installed distribution whose licence is permissive."""

    name: str
    version: str
    licence: str


@dataclass(frozen=True)
class SourceFile:
    """One Python file: where it is, its dotted module name, and the distribution it came with."""

    path: Path
    module: str
    distribution: str


def split_of(module: str) -> str:
    """Side of a module: a hash of its dotted name only, so it is the same on every machine and version."""
    position = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") / 2**32
    return next(side for side, end in zip(SPLITS, _SPLIT_ENDS, strict=True) if position < end)


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file below `root`; a vendored copy gets the name of the original."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    for vendor in ("_vendor", "vendored", "extern"):
        if vendor in parts[:-1]:
            parts = parts[parts.index(vendor) + 1 :]
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def tree_sources(root: Path) -> list[SourceFile]:
    """Every Python file below a folder, whatever its licence: the folder is the caller's choice."""
    return [SourceFile(path, module_name(path, root), root.name) for path in _python_files(root)]


def installed_sources(roots: Iterable[Path] = ()) -> tuple[list[SourceFile], list[Distribution]]:
    """The standard library and every permissively licensed distribution installed here.

    `roots` names further site-packages folders. A file that no distribution claims has no known licence and is
    left out. Sorted by module, so the result does not depend on the order of the file system.
    """
    standard_library = Path(sysconfig.get_path("stdlib"))
    files = {
        path: SourceFile(path, module_name(path, standard_library), "python")
        for path in _python_files(standard_library)
    }
    distributions = [Distribution("python", sysconfig.get_python_version(), "PSF-2.0")]
    for root in dict.fromkeys(
        [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")), *roots]
    ):
        for installed in metadata.distributions(path=[str(root)]):
            fields = installed.metadata  # parsed anew each time it is asked for
            licence = _licence(fields)
            if licence is None:
                continue
            distributions.append(Distribution(fields["Name"], fields["Version"], licence))
            # RECORD is read as text: `installed.files` builds an object for each of some 30,000 entries.
            for line in (installed.read_text("RECORD") or "").splitlines():
                name = line.rsplit(",", 2)[0]
                if name.endswith(".py") and not name.startswith(("..", "/", '"')):
                    path = root / name
                    files.setdefault(path, SourceFile(path, module_name(path, root), fields["Name"]))
    ordered = sorted(files.values(), key=lambda file: (file.module, str(file.path)))
    return ordered, sorted(set(distributions), key=lambda one: (one.name.lower(), one.version))


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "node_modules", ".git"} & set(path.relative_to(root).parts):
            yield path


def _licence(fields: metadata.PackageMetadata) -> str | None:
    """The licence as a short text when it is permissive, else None."""
    stated = fields.get_all("License-Expression") or []
    stated += [
        line.split("::")[-1] for line in fields.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    if not stated:  # old metadata: free text, possibly the whole licence; its first line names it
        stated = [text.strip().split("\n")[0][:80] for text in fields.get_all("License") or []]
    text = "; ".join(part.strip() for part in stated if part.strip())
    return text if _PERMISSIVE.search(text) and not _COPYLEFT.search(text) else None
