"""The benchmark runner on a case of milliseconds: what it measures, and what it says of a contender that cannot run."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
import benchmarks.gemms
import benchmarks.gpu
import benchmarks.rows
from benchmarks import numerics
from benchmarks.cases import Case, make_inputs
from benchmarks.linear_kd import OPERATION
from benchmarks.measure import peak_bytes_of, quartiles
from benchmarks.report import markdown, records
from benchmarks.runner import Row, run_case
from benchmarks.suites import SUITES

TINY = Case("forward_kl", tokens=48, width=8, teacher_width=12, vocabulary=300, masked=0.5)
MEBIBYTE = 2**20


def test_a_case_is_measured_in_processes_and_checked_against_fp64() -> None:
    rows = run_case(TINY, ["products", "ours", "eager"], rounds=3, seconds=0.0, say=lambda what: None)
    for row in rows:
        assert row.cannot_run is None
        assert len(row.seconds) == 3 and min(row.seconds) > 0
    assert rows[0].errors == {}  # a yardstick computes no loss
    for row in rows[1:]:
        assert row.errors.keys() == {"loss_error", "hidden_grad_error", "weight_grad_error"}
        assert 0 < max(row.errors.values()) < 1e-5


def test_inputs_look_trained() -> None:
    """A student near its teacher, neither of them uniform: what benchmarks/README.md says of the inputs."""
    inputs = make_inputs(Case("forward_kl", tokens=64, vocabulary=8000))
    student = torch.log_softmax(inputs.student_hidden.detach() @ inputs.student_weight.detach().T, -1)
    teacher = torch.log_softmax(inputs.teacher_hidden @ inputs.teacher_weight.T, -1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    assert 0.02 < divergence < 0.5
    assert 2 < entropy < 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_peak_memory_is_what_the_step_adds() -> None:
    held = torch.ones(40 * MEBIBYTE // 4)
    peak = peak_bytes_of(lambda: (held + 1).sum())
    assert peak is not None and 38 * MEBIBYTE < peak < 60 * MEBIBYTE


def test_ratios_are_taken_within_a_round() -> None:
    """One slow round triples everybody; the ratio of the medians would be 3, that of the rounds is 2."""
    rows = [Row("products", [1.0, 1.0, 3.0]), Row("ours", [2.0, 6.0, 6.0], errors={"loss_error": 1e-7})]
    floor, ours = records(TINY, rows)
    assert floor["times_floor"] == 1.0 and ours["times_floor"] == 2.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_a_contender_that_cannot_run_says_why() -> None:
    found = records(
        TINY, [Row("products", [1.0]), Row("trl", cannot_run="not installed (No module named 'trl')")]
    )
    assert "cannot run: not installed (No module named 'trl')" in markdown(found)
    assert found[1]["times_floor"] is None


def test_the_command_prints_a_table_and_writes_csv_and_json(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks", "--suite", "smoke", "--case", "jsd", "--rounds", "3"]
    command += ["--contenders", "products", "copy", "--skip-tests", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"| {OPERATION.labels['products']} |" in done.stdout
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == ["products", "copy"]
    whole = json.loads(table.with_suffix(".json").read_text())
    assert whole["environment"]["torch"] == torch.__version__ and len(whole["rows"]) == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json"}


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    assert main(["--case", "no_such"]) == 2
    assert "No case of suite 'cpu' holds ['no_such'] in its name" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--suite", "gpu"]) == 2
        assert "Suite 'gpu' needs a CUDA or ROCm GPU, and torch finds none" in capsys.readouterr().err
        assert benchmarks.gpu.main(["--out", "nowhere"]) == 2 and not Path("nowhere").exists()
        assert "benchmarks.gpu needs a CUDA or ROCm GPU" in capsys.readouterr().err
        assert benchmarks.rows.main([]) == 2


def test_the_gpu_command_keeps_what_a_cut_run_has(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A part that is cut, with the processes that it started, or fails, leaves the later ones to run; so do the tests."""
    sleeps = "import time; time.sleep(60)"
    programs = {
        "tests": "print('a kernel is wrong'); raise SystemExit(3)",
        "gpu": f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {sleeps!r}]).pid); {sleeps}",
        "rows": "import sys; sys.exit(4)",
        "batches": "import sys, pathlib; pathlib.Path(sys.argv[1], 'late').touch()",
    }

    def command(name: str, minutes: float, out: Path) -> list[str]:
        return [sys.executable, "-u", "-c", programs[name], str(out)]

    assert benchmarks.gpu.run_parts(time.monotonic() + 6, tmp_path, list(programs), command) == 3
    shown = capfd.readouterr().out
    assert (
        "gpu: cut by the clock; what was finished stands" in shown and "rows: failed with status 4" in shown
    )
    assert "The kernels' tests fail: see tests.txt" in shown and (tmp_path / "late").exists()
    assert (tmp_path / "tests.txt").read_text() == "a kernel is wrong\n"
    child = next(int(line) for line in shown.splitlines() if line.isdigit())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_every_part_of_the_gpu_command_exists(tmp_path: Path) -> None:
    for name in benchmarks.gpu.PARTS:
        command = benchmarks.gpu.command_of(name, 1.0, tmp_path)
        assert command is not None and command[:2] == [sys.executable, "-m"]
        if "--suite" in command and command[2] == "benchmarks":
            from benchmarks.__main__ import parse

            chosen = parse(command[3:])
            assert chosen.skip_tests and chosen.out == tmp_path and SUITES[chosen.suite][0].device == "cuda"


def test_the_first_gpu_run_fits_a_loan() -> None:
    """Twelve minutes, of which a start of processes and a cut cost some seconds."""
    assert benchmarks.gpu.MINUTES <= 11.5
    assert set(benchmarks.gpu.FIRST) < set(benchmarks.gpu.PARTS)
    assert list(benchmarks.gpu.FIRST) == list(benchmarks.gpu.PARTS)[: len(benchmarks.gpu.FIRST)]
    weights = [benchmarks.gpu.PARTS[name].weight for name in benchmarks.gpu.FIRST]
    assert all(weight / sum(weights) * benchmarks.gpu.MINUTES > 0.6 for weight in weights)


def test_gemms_are_measured_and_written(tmp_path: Path) -> None:
    """On a CPU and small: every record with the environment's stamp, and errors of one rounding."""
    shape = ["--shape", "96", "16", "24", "500"]
    assert benchmarks.gemms.main(["--device", "cpu", "--out", str(tmp_path), *shape]) == 0
    (path,) = tmp_path.iterdir()
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["gemm"] for row in rows][:2] == ["teacher logits", "student logits"] and len(rows) == 6
    assert all(float(row["error"]) < 2.0**-8 and float(row["ms"]) > 0 for row in rows)
    assert {row["torch"] for row in rows} == {torch.__version__}
    if not torch.cuda.is_available():
        assert benchmarks.gemms.main([]) == 2


@pytest.mark.parametrize(
    ("dtype", "solver"),
    [("bfloat16", "ours"), ("float16", "ours"), ("float32", "ours, inputs cast to float64")],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_are_the_exact_ones_rounded_once(divergence: str, dtype: str, solver: str) -> None:
    """From 1e-4 to 10 nats, within twice the rounding; the same script makes the table of docs/numerics.md."""
    lines = [numerics.measure(16, 32, 2000, one, dtype, divergence) for one in numerics.DISTANCES]
    for line in lines:
        ours = line.errors[solver]
        assert not isinstance(ours, str), ours
        assert ours[1] <= 2.0 * line.rounded[0] and ours[2] <= 2.0 * line.rounded[1], line
        assert line.errors["TRL"] == "not installed" or len(line.errors["TRL"]) == 3
    assert "| 2000 | " in numerics.table(lines)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [  # a contender of another suite; a folder that is a file
        (["--contenders", "pkd"], "None of the contenders pkd takes part in these cases of suite 'smoke'.\n"),
        (["--out", __file__], f"--out {__file__} cannot be a folder: File exists.\n"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_said_first(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmarks.__main__.main(["--suite", "smoke", "--case", "jsd", *options]) == 2
    assert capsys.readouterr().err == sentence
