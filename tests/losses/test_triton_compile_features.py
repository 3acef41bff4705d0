"""The Triton kernels of the feature losses compiled without a GPU: nothing spills, and products use matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.support.compiled_features import ARCHITECTURES, Counts, table, work

# One process of a parallel run makes the table for all of these tests.
pytestmark = pytest.mark.xdist_group(__name__)

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("sm_90", "gfx942"), id="sm_90 and gfx942"),
        pytest.param(("sm_80", "sm_100"), id="sm_80 and sm_100", marks=pytest.mark.thorough),
    ],
)
def architectures(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


@pytest.fixture(scope="module")
def counts(architectures: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Counts]:
    """Counts of every variant, from processes in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.compiled_features", "--portion", str(portion), str(PROCESSES), *architectures],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for portion in range(PROCESSES)
    ]  # fmt: skip
    found = []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        found += [Counts(**json.loads(line)) for line in out.splitlines()]
    found.sort(key=lambda row: (ARCHITECTURES.index(row.architecture), row.variant))
    print(table(found))
    return found


def test_every_variant_compiles(architectures: tuple[str, ...], counts: list[Counts]) -> None:
    assert len(counts) == sum(len(work(portion, PROCESSES, architectures)) for portion in range(PROCESSES))
    assert {row.architecture for row in counts} == set(architectures)


def test_nothing_spills(counts: list[Counts]) -> None:
    assert [f"{row.architecture}: {row.variant}" for row in counts if row.spills] == []


def test_half_products_use_matrix_units(counts: list[Counts]) -> None:
    halves = [row for row in counts if "bf16" in row.variant]
    assert len(halves) >= 9
    assert [f"{row.architecture}: {row.variant}" for row in halves if row.products == 0] == []
