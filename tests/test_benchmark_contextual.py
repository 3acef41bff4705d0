"""The benchmark of contextual_relation_loss: its baseline is the same loss, and every contender is measured."""

import pytest
import torch

from benchmarks.contextual import SUITES, eager, main, make_inputs, ours


def test_the_eager_lines_are_the_same_loss() -> None:
    (case,) = SUITES["smoke"]
    student, teacher = make_inputs(case)
    torch.testing.assert_close(eager(case, student, teacher), ours(case, student, teacher))


def test_the_command_measures_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "smoke", "--rounds", "2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| ", "| ours", "| eager"] or len(rows) == 3
    for row in rows[1:]:
        assert float(row[1]) > 0.0 and float(row[3]) < 1e-5 and float(row[4]) < 1e-5


def test_a_suite_without_its_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--suite", "gpu"]) == 2
    assert "Suite 'gpu' needs a CUDA or ROCm GPU" in capsys.readouterr().err
