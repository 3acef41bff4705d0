"""The Triton kernels compiled without a GPU: nothing spills, and aligned rows are read 128 bits at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.support.compiled import ARCHITECTURES, Counts, main_variants, other_variants, table, work

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> list[Counts]:
    """Counts of every variant, from processes in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.compiled", "--portion", str(portion), str(PROCESSES)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for portion in range(PROCESSES)
    ]
    found = []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        for line in out.splitlines():
            row = json.loads(line)
            for kind in ("loads", "stores"):
                row[kind] = {int(bits): number for bits, number in row[kind].items()}
            found.append(Counts(**row))
    found.sort(key=lambda row: (ARCHITECTURES.index(row.architecture), row.variant))
    print(table(found))
    return found


def names(rows: Sequence[Counts]) -> list[str]:
    return [f"{row.architecture}: {row.variant}" for row in rows]


def test_every_variant_compiles(counts: list[Counts]):
    assert len(counts) == sum(len(work(portion, PROCESSES)) for portion in range(PROCESSES))
    assert {row.architecture for row in counts} == set(ARCHITECTURES)


def test_nothing_spills(counts: list[Counts]):
    assert names([row for row in counts if row.spills]) == []


def test_aligned_rows_are_read_128_bits_at_a_time(counts: list[Counts]):
    """What is narrower is a number per row: label, its logit and its bias, weight, scale."""
    wide = {variant.name for variant in main_variants() + other_variants() if variant.wide}
    rows = [row for row in counts if row.variant in wide]
    assert len(rows) > len(wide)
    assert names([row for row in rows if sum(row.loads.values()) - row.loads[128] > 5]) == []


def test_padded_rows_are_read_128_bits_at_a_time_but_for_their_tail(counts: list[Counts]):
    """Two passes, both sides, two loads of 128 bits a thread in each: as many as in the full tiles of aligned rows."""
    padded = [row for row in counts if "padded" in row.variant]
    assert len(padded) == 6
    assert names([row for row in padded if row.loads.get(128, 0) < 8]) == []
