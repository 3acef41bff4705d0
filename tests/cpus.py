"""The numeric tests as other CPUs run them: `python -m tests.cpus [VARIANT...] [-- PYTEST OPTIONS]`.

Libraries choose their code by the CPU, and can be told to choose that of an older one. Vector width changes the order of
sums; without fused multiply-add a product is rounded once more. Each variant is a run of pytest in a process of its own.
Prints a table of the largest error / bound of each variant, and fails when a test failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.support.ratios import NEAR, PROPERTY

ROOT = Path(__file__).resolve().parents[1]

# Torch's own kernels, oneDNN, MKL; numpy and its OpenBLAS, which Triton's interpreter computes with.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
SSE4 = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OPENBLAS_CORETYPE": "Nehalem",
}
ONE, TWO = ({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} for threads in ("1", "2"))
VARIANTS: dict[str, dict[str, str]] = {
    "native": ONE,
    "native-2-threads": TWO,
    "avx2-2-threads": {**AVX2, **TWO},
    "sse4": {**SSE4, **ONE},
    "compatible-2-threads": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", **TWO},
}


def numeric_tests() -> list[str]:
    """The files whose results are held to bounds of the arithmetic."""
    found = sorted((ROOT / "tests" / "losses").glob("test_*.py"))
    marks = ("tests.support.budget", "tests.support.row_kernels", "test_properties")
    return [str(path.relative_to(ROOT)) for path in found if any(mark in path.read_text() for mark in marks)]


def older_numpy() -> str:
    """The vector instructions that numpy chooses at run time on this CPU, all to be left out."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name])


def run(name: str, options: list[str]) -> tuple[bool, str]:
    """Whether the tests of one variant passed, and its line of the table."""
    environment = {**os.environ, **VARIANTS[name]}
    if name == "sse4":
        environment["NPY_DISABLE_CPU_FEATURES"] = older_numpy()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", "--ratios", "10", f"--junitxml={report}"]
        files = [] if any(option.startswith("tests/") for option in options) else numeric_tests()
        done = subprocess.run([*command, *files, *options], env=environment, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    found = sorted(
        ((*value.split(" ", 1), case.get("name", "")) for case in cases for value in properties(case)),
        key=lambda entry: float(entry[0]),
        reverse=True,
    )
    near = sum(float(ratio) > NEAR for ratio, *_ in found)
    largest, what, test = found[0] if found else ("", "", "")
    line = f"| {name} | {len(cases)} | {failed} | {len(found)} | {near} | {largest} | `{test}`, {what} |"
    return done.returncode == 0, line


def properties(case: ElementTree.Element) -> list[str]:
    """The largest error / bound of a test, where it has one."""
    return [entry.get("value", "") for entry in case.iter("property") if entry.get("name") == PROPERTY]


def main() -> int:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m tests.cpus", description=__doc__)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    names = parser.parse_args(words[:cut]).variants or list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"there is no variant {', '.join(sorted(unknown))}; choose from {', '.join(VARIANTS)}")
    results = []
    for name in names:
        print(f"== {name}", flush=True)
        results.append(run(name, words[cut + 1 :]))
    print(f"| variant | tests | failed | with bounds | above {NEAR} | largest error / bound | where |")
    print("|---|---:|---:|---:|---:|---:|---|")
    print("\n".join(line for _, line in results))
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
