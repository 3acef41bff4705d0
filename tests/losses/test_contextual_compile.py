"""The Triton kernels of windows of neighbours compiled without a GPU: nothing spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.support.compiled_windows import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_compiles_without_a_spill(tmp_path: Path) -> None:
    """In a process of its own: under TRITON_INTERPRET=1 a kernel is a function that nothing can compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_windows"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert {row["architecture"] for row in found} == set(ARCHITECTURES)
    assert len(found) == 17 + 3 * 7
    spilled = [(row["kernel"], row["architecture"], row["spills"]) for row in found if row["spills"]]
    assert spilled == []
