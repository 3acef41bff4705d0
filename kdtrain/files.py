"""Files: written whole or not at all (into a temporary neighbour first, then moved into place); lines of JSON; sizes."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kdtrain.console import say
from kdtrain.errors import KdtrainError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`; after any failure the old file, or no file, stands there.

    Raises:
        KdtrainError: the system refused (full disk, no permission); the temporary file is gone by then.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, error, len(content)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a newline at the end."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save as serialize  # loads torch, which reading a recipe does without

    write_atomic(path, serialize({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path`, replacing what was there, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        raise _refused(path, error) from error
    except KdtrainError as error:  # a file inside: the reader knows the folder by its real name
        raise (_refused(path, error.__cause__) if isinstance(error.__cause__, OSError) else error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(folder: Path, what: str, field: str) -> Iterator[None]:
    """Be the only process that writes into `folder`; the system drops the lock when the process ends, however it ends.

    What a killed process left half written there is removed.

    Args:
        what: what the folder is, for the sentences, such as "the teacher cache".
        field: the field of a recipe that names it.

    Raises:
        KdtrainError: another process is writing there, or nobody can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise KdtrainError(
            f"{what} {folder} cannot be written: {error.strerror}; give another {field}"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise KdtrainError(
                f"another run (process {file.read().strip() or 'unknown'}) is writing {what} {folder}; wait until it is done, "
                f"then run the same command again, or give another {field}"
            ) from None
        except OSError as error:  # some file systems of clusters know no locks
            say(f"{folder} cannot be locked ({error.strerror}): let no other run write there meanwhile")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def append_line(path: Path, line: str) -> None:
    """Add one line to a text file, whole or not at all."""
    content = line.encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            # A disk with a little room left takes a part and raises only on the next attempt.
            while content:
                content = content[file.write(content) :]
        except OSError as error:
            file.truncate(before)
            raise _refused(path, error, len(line) + 1) from error


def json_object(place: str, line: bytes | str) -> dict[str, Any]:
    """The object in a line of JSON.

    Raises:
        KdtrainError: it holds none, with its place.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise KdtrainError(f"{place} is not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise KdtrainError(f"{place} must hold a JSON object, got {type(row).__name__}")
    return row


def folder_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def human_bytes(count: float) -> str:
    """1234567 as '1.2 MB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _refused(path: Path, error: Exception, size: int | None = None) -> KdtrainError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    amount = f" ({human_bytes(size)})" if size is not None else ""
    return KdtrainError(
        f"could not write {path}{amount}: {reason}; nothing was left half written. "
        "Free some space or choose another folder, then run the same command again"
    )
