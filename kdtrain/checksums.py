"""Checksums of files that are read back: `checksums.json` in a folder names the SHA-256 of each, and is checked before they are used.

A folder is sealed when all that belongs into it is written, so the file is the last to appear.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from kdtrain.errors import KdtrainError
from kdtrain.files import write_json

FILE = "checksums.json"


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the checksums of a folder's files.

    Args:
        names: of files, or of folders with all that they hold; those that do not exist are left out. None for everything.
    """
    places = [folder] if names is None else [folder / name for name in names]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    own = (folder / FILE, folder / ".lock")
    write_json(
        folder / FILE,
        {str(file.relative_to(folder)): sha256(file) for file in files if file.is_file() and file not in own},
    )


def seal_again(folder: Path, name: str, remedy: str) -> None:
    """Put one file that was written again, or is new, among a folder's checksums; the others stay as they are."""
    write_json(folder / FILE, {**_read(folder, remedy), name: sha256(folder / name)})


def sealed_names(folder: Path, remedy: str) -> list[str]:
    """The files that a folder's checksums name; none where it has no checksums.

    Raises:
        KdtrainError: checksums that cannot be read; `remedy` ends the sentence.
    """
    return list(_read(folder, remedy)) if (folder / FILE).exists() else []


def check_sealed(folder: Path, remedy: str, below: str = "") -> None:
    """Refuse a folder of which a file has changed since it was sealed, or is missing.

    Args:
        remedy: what to do, for the end of the sentence.
        below: checks files of this name, or in the folder of this name, only.

    Raises:
        KdtrainError: names the first such file.
    """
    for name, digest in _read(folder, remedy).items():
        if below and name != below and not name.startswith(f"{below}/"):
            continue
        try:
            found = sha256(folder / name)
        except FileNotFoundError:
            raise KdtrainError(f"{folder / name} is missing; {remedy}") from None
        except OSError as error:
            raise KdtrainError(
                f"{folder / name} cannot be read ({error.strerror}); make it readable"
            ) from None
        if found != digest:
            raise KdtrainError(f"{folder / name} is damaged: it has changed since it was written; {remedy}")


def sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path, remedy: str) -> dict[str, str]:
    path = folder / FILE
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
            raise ValueError("it holds no names with checksums")
    except FileNotFoundError:
        raise KdtrainError(f"{path} is missing; {remedy}") from None
    except PermissionError as error:
        raise KdtrainError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except (OSError, ValueError) as error:
        raise KdtrainError(f"{path} is damaged ({error}); {remedy}") from None
    return found
