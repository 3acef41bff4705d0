"""Files: written whole or not at all (into a temporary neighbour first, then moved into place); lines of JSON; sizes."""

import fcntl
import json
import os
import re
import shutil
import socket
import zlib
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
    temporary = _neighbour(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        # Whoever may write here could have put a link where the temporary file goes: it is not followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
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
    """Give a temporary folder that becomes `path`, replacing what was there, when the block ends without error.

    By then its files are on the disk, not in the system's memory only, and have the usual modes. Of a folder that is replaced
    one version, old or new, is there after any failure: a kill between the two renames is mended by `remove_leftovers`.
    """
    temporary, old = _neighbour(path, "tmp"), _neighbour(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        raise _refused(path, error) from error
    except KdtrainError as error:  # a file inside: the reader knows the folder by its real name
        raise (_refused(path, error.__cause__) if isinstance(error.__cause__, OSError) else error) from error
    except Exception as error:  # tokenizers raises a bare one where the system refuses
        if type(error) is not Exception:
            raise
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine left half written in a folder, and put back what they had moved aside.

    Args:
        name: of the one file or folder that is about to be written; None for all.
    """
    for left in folder.glob(".*"):
        found = LEFTOVER.fullmatch(left.name)
        if found is None or (name is not None and found["name"] != name) or found["host"] != _host():
            continue
        process = int(found["process"])
        if process != os.getpid() and _runs(process):
            continue
        target = folder / found["name"]
        if found["kind"] == "old" and not target.exists():
            os.replace(left, target)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def flush_folder(path: Path) -> None:
    """Bring the names in a folder onto the disk, so that a rename survives a power cut."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(number)
    finally:
        os.close(number)


def _settle(folder: Path) -> None:
    """Give all files below a folder its usual modes and bring them onto the disk. (safetensors makes files for the owner alone.)"""
    mode = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        if path.is_dir():
            flush_folder(path)
        else:
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)\.(?P<kind>tmp|old)")
"""Names of temporary neighbours: whose, by which process of which machine."""


def _neighbour(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{kind}")


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing, only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def writing(folder: Path, what: str, field: str) -> Iterator[None]:
    """Be the only process that writes into `folder`; the system drops the lock when the process ends, however it ends.

    What a killed process left half written there is removed.

    Args:
        folder: made where it is missing.
        what: what the folder is, for the sentences, such as "the teacher cache".
        field: the field of a recipe that names it.

    Raises:
        KdtrainError: another process is writing there, or nobody can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        lock = open(number, "a+")  # noqa: SIM115, closed below
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
        with suppress(OSError):  # the number serves a sentence only, and the disk may be full
            os.ftruncate(number, 0)
            os.write(number, f"{os.getpid()}\n".encode())
        for place in (folder, *(one for one in folder.iterdir() if one.is_dir())):
            remove_leftovers(place)
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
