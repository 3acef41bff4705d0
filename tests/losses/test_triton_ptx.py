"""The gradient that is written over its own logits, executed from PTX: no order of the warps changes it.

Within a row warps meet at barriers only. A store must therefore come after a barrier that comes after every load of the same
bytes by another thread: then one order of the warps shows the result of all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.support.ptx_cases import cases

# One process executes everything for all of these tests.
pytestmark = pytest.mark.xdist_group(__name__)

ROOT = Path(__file__).resolve().parents[2]
CASES = [case.name for case in cases()]
PLANTED = [name for name in CASES if name.startswith("planted")]
# A case takes seconds: every third in each run, all with `make test-thorough`.
WHOLE = [
    pytest.param(name, marks=[pytest.mark.thorough] if number % 3 else [])
    for number, name in enumerate(name for name in CASES if name not in PLANTED)
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What became of every case that was chosen, from a process in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    chosen = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    ]
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.ptx_run", "--cases", *chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return {row["name"]: row for row in map(json.loads, process.stdout.splitlines())}


@pytest.mark.parametrize("name", WHOLE)
def test_order_of_warps_is_open_and_the_result_is_not(
    name: str, outcomes: dict[str, dict], record_property
) -> None:
    """No two threads meet at a byte between two barriers, nothing overwritten is read, and the values are right."""
    found = outcomes[name]
    assert found["fault"] == ""
    assert found["barriers"] > 0
    assert found["orders_agree"]
    assert found["error"] <= 1.0
    line = f"{name}: {found['instructions']} instructions, {found['barriers']} barriers, error/bound {found['error']:.2f}"
    record_property("executed_from_ptx", line)


@pytest.mark.parametrize("name", PLANTED)
def test_a_missing_barrier_is_found(name: str, outcomes: dict[str, dict]) -> None:
    """The same kernels compiled without the barrier before the store, over whole tiles and over the tail of a row."""
    fault = outcomes[name]["fault"]
    assert "numeric.py" in fault  # the store of a tile
    assert "st.global" in fault
    assert "writes what another thread has read since the last barrier" in fault
