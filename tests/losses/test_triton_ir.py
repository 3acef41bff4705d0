"""Every Triton kernel executed from its IR: no access outside a tensor, no race, nothing unwritten, right values."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if find_spec("ttsem") is None:
    pytest.skip(
        "needs the package ttsem, which executes Triton IR (constraints.txt)", allow_module_level=True
    )
if torch.cuda.is_available():
    pytest.skip("ttsem stands in for a GPU, and there is one", allow_module_level=True)

from tests.support.ir_cases import cases

# One process executes everything for all of these tests.
pytestmark = pytest.mark.xdist_group(__name__)

ROOT = Path(__file__).resolve().parents[2]
CASES = [case.name for case in cases()]
KERNEL = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What became of every case, from a process in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.ir_run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return {row["name"]: row for row in map(json.loads, process.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_ir_is_safe_and_right(name: str, outcomes: dict[str, dict], record_property) -> None:
    """The bound of the error is derived in `ir_run.py`."""
    found = outcomes[name]
    assert found["fault"] == ""
    assert found["launches"] > 0
    assert found["error"] <= 1.0, found["worst"]
    record_property(
        "executed_from_ir", f"{name}: {found['launches']} launches, error/bound {found['error']:.2f}"
    )


def test_every_kernel_is_executed(outcomes: dict[str, dict]) -> None:
    """A new kernel needs a case."""
    sources = (ROOT / "kernels" / "kdkernels" / "_triton").rglob("*.py")
    kernels = {name for source in sources for name in KERNEL.findall(source.read_text(encoding="utf-8"))}
    executed = {kernel for name in CASES for kernel in outcomes[name]["kernels"]}
    assert kernels
    assert kernels == executed


def test_ids_out_of_range_are_not_read(outcomes: dict[str, dict], record_property) -> None:
    """Labels and ids of a map that nobody can check on a device become NaN in their rows."""
    found = {name: row for name, row in outcomes.items() if name.startswith("hostile")}
    assert len(found) == 5
    assert {name: row["fault"] for name, row in found.items() if row["fault"]} == {}
    assert [name for name, row in found.items() if row["error"]] == []
    record_property("executed_from_ir", f"hostile ids: {', '.join(found)}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("planted: a store without a mask", "24 element(s) past the end of the tensor"),
        ("planted: a race of program instances", "both touch element 0 of `out_ptr`"),
    ],
)
def test_planted_defects_are_found(name: str, words: str, outcomes: dict[str, dict]) -> None:
    assert words in outcomes[name]["fault"]
    assert "# planted" in outcomes[name]["fault"]  # the source line


def test_an_element_that_no_kernel_writes_is_found(outcomes: dict[str, dict]) -> None:
    found = outcomes["planted: an element that nobody writes"]
    assert found["fault"] == ""
    assert found["error"] == float("inf")
