"""A disk that refuses: one sentence, and nothing half written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdtrain.errors import KdtrainError
from kdtrain.files import atomic_folder, human_bytes, write_atomic, write_tensors

LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from kdtrain.files import append_line, atomic_folder, write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails as on a full disk in place of ending the process
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"weight": torch.zeros(100_000)}
def folder():
    with atomic_folder(Path("folder")) as temporary:
        write_tensors(temporary / "small.safetensors", {"weight": torch.zeros(4)})
        write_tensors(temporary / "tensors.safetensors", big)
def lines():
    for _ in range(1000):
        append_line(Path("metrics.jsonl"), "x" * 998)
for write in (lambda: write_tensors(Path("tensors.safetensors"), big), folder, lines):
    try:
        write()
    except ValueError as error:
        print(error)
"""


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    write_tensors(tmp_path / "tensors.safetensors", {"weight": torch.ones(3)})
    before = (tmp_path / "tensors.safetensors").read_bytes()
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, third = found.stdout.splitlines()
    assert first.startswith(
        "could not write tensors.safetensors (400.1 kB): File too large; nothing was left half written."
    )
    assert second.startswith("could not write folder: File too large; nothing was left half written.")
    assert "choose another folder" in first
    assert (tmp_path / "tensors.safetensors").read_bytes() == before
    assert third.startswith("could not write metrics.jsonl (999 B): File too large;")
    assert (tmp_path / "metrics.jsonl").read_text() == ("x" * 998 + "\n") * 100  # 99,900 of 100,000 bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensors.safetensors"]


def test_no_permission_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        KdtrainError, match=r"could not write .*file/inner \(1 B\): (Not a directory|File exists)"
    ):
        write_atomic(tmp_path / "file" / "inner", "x")


def test_folder_replaces_the_old_one_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target) as temporary:
        (temporary / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 999, 1234567, 4e9)] == ["0 B", "999 B", "1.2 MB", "4.0 GB"]
