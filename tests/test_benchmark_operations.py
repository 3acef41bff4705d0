"""Everything that the benchmarks compare: contenders of a case compute the same loss and gradients, and every row has a name."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import batches, language_steps, peers
from benchmarks.cases import Case, make_inputs
from benchmarks.operation import AnyCase, CannotRun
from benchmarks.registry import OPERATIONS, operation_of
from benchmarks.report import markdown, records
from benchmarks.runner import Row, run_case
from benchmarks.suites import SUITES
from benchmarks.worker import relative_error

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"tokens": 48, "width": 8, "teacher_width": 12, "vocabulary": 300, "masked": 0.5}
HEADS = {
    (case.operation, case.divergence, case.teacher, case.mode): replace(
        case, **SMALL, device="cpu", dtype="float32"
    )
    for suite in SUITES.values()
    for case in suite
    if isinstance(case, Case)
}
OTHERS = [case for case in SUITES["smoke"] if not isinstance(case, Case) and operation_of(case).truth]


def solve(case: AnyCase, contender: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of a contender in this process."""
    operation = operation_of(case)
    inputs = operation.make_inputs(case)
    found = {"loss": operation.contenders[contender](case, inputs)()}
    for name, leaf in operation.leaves(case, inputs).items():
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


# One small case of every kind that a suite has, on a GPU or not: the truth is what the tables' errors are measured against,
# the eager lines are the baseline of a claim, so both must be the same loss as ours.
@pytest.mark.parametrize("case", [*HEADS.values(), *OTHERS], ids=lambda case: case.name)
def test_contenders_compute_the_same(case: AnyCase) -> None:
    operation = operation_of(case)
    assert operation.truth is not None
    truth = operation.truth(case, operation.make_inputs(case))
    for contender in ("ours", "eager"):
        found = solve(case, contender)
        assert found.keys() == truth.keys()
        for name, value in found.items():
            # A cross-term's value is a difference of large numbers (docs/numerics.md).
            limit = 1e-3 if contender == "ours" and getattr(case, "teacher", "") == "cross_term" else 2e-5
            assert relative_error(value, truth[name]) < limit, (contender, name)


# The peers that run on a CPU, in every divergence that they have.
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_trl_computes_the_same(divergence: str) -> None:
    pytest.importorskip("trl")
    case = Case(divergence, **SMALL)
    ours, theirs = solve(case, "ours"), solve(case, "trl")
    assert all(relative_error(theirs[name], ours[name].double()) < 1e-4 for name in ours)


def test_torch_linear_cross_entropy_computes_the_same() -> None:
    case = Case("none", operation="linear_ce", teacher="none", **SMALL)
    ours, theirs = solve(case, "ours"), solve(case, "torch_ce")
    assert all(relative_error(theirs[name], ours[name].double()) < 1e-5 for name in ours)


def test_a_peer_says_why_it_cannot_run() -> None:
    inputs = make_inputs(Case("forward_kl", **SMALL))
    with pytest.raises(
        CannotRun, match="takes a teacher as hidden states and a head only, here it comes as logits"
    ):
        peers.need_head(Case("forward_kl", teacher="logits"))
    with pytest.raises(CannotRun, match="has no tvd"):
        peers.beta_of(Case("tvd"))
    with pytest.raises(CannotRun, match=r"not installed \(No module named 'no_such_peer'\)"):
        peers.find("no_such_peer", "loss")
    for peer in (peers.liger_jsd, peers.fla):
        with pytest.raises(CannotRun, match=r"not installed|its Triton kernels need a GPU"):
            peer(Case("forward_kl", **SMALL), inputs)
    with pytest.raises(CannotRun, match=r"not installed|takes a teacher as probabilities only"):
        peers.liger_kl(Case("forward_kl", **SMALL), inputs)
    for peer in (peers.liger_cross_entropy, peers.cut_cross_entropy):
        with pytest.raises(CannotRun, match=r"not installed|its Triton kernels need a GPU"):
            peer(Case("none", operation="linear_ce", teacher="none", **SMALL), inputs)


def test_every_contender_and_case_is_known() -> None:
    for family, operation in OPERATIONS.items():
        assert operation.labels.keys() == operation.contenders.keys(), family
        assert operation.floor is None or operation.floor in operation.contenders
        assert operation.yardsticks <= operation.contenders.keys()
        assert operation.tests
    for suite in SUITES.values():
        assert len({case.name for case in suite}) == len(suite)
        for case in suite:
            again = OPERATIONS[case.family].case(**case.as_dict())
            assert again == case


def test_whole_steps_are_measured_in_processes() -> None:
    """Plain training is the floor, tokens a second follow from the case, nothing is said of errors."""
    (case,) = (case for case in SUITES["smoke"] if case.family == "study_step")
    rows = run_case(case, ["ft", "ckd"], rounds=3, seconds=0.0, say=lambda what: None)
    found = records(case, rows)
    assert [row.cannot_run for row in rows] == [None, None] and rows[1].errors == {}
    assert found[0]["times_floor"] == 1.0 and found[1]["times_floor"] > 0
    assert found[1]["tokens_per_second"] == pytest.approx(2 * 16 / found[1]["median_s"])
    assert "x plain training |" in markdown(found) and "dX error" not in markdown(found)


def test_the_steps_of_a_language_model_compute_the_same() -> None:
    """Fused and eager, online and from the cache of hidden states: one loss before any weight has moved, and after."""
    (case,) = language_steps.SMOKE
    losses = {}
    for name in OPERATIONS["language_step"].contenders:
        step = language_steps.OPERATION.contenders[name](case, language_steps.make_inputs(case))
        losses[name] = [step().item() for _ in range(3)]
    assert losses["plain"] == pytest.approx(losses["plain_eager"], rel=1e-5)
    assert losses["kd"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["kd"] == pytest.approx(losses["stored_hidden"], rel=1e-3)  # stored in bfloat16
    assert losses["kd"][0] < losses["kd_features"][0]
    assert losses["plain"][0] > losses["plain"][2] - 0.1


def test_the_study_steps_run_every_method() -> None:
    (case,) = (case for case in SUITES["smoke"] if case.family == "study_step")
    operation = operation_of(case)
    for contender in operation.contenders.values():
        step = contender(case, operation.make_inputs(case))
        assert step().isfinite() and step().isfinite()


def test_the_largest_batch() -> None:
    for edge in (0, 1, 2, 3, 17, 64):
        asked: list[int] = []

        def fits(rows: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(rows)
            return rows <= edge

        assert batches.largest(fits) == edge and len(asked) <= 14


PEAKS = """
from dataclasses import replace
from benchmarks import batches, language_steps
case = replace(language_steps.SMOKE[0], rows=8, length=64, vocabulary=4000)
batches.peak_of("kd", language_steps.SMOKE[0])  # imports are no part of it
print(*(batches.peak_of(contender, case) for contender in ("kd", "eager")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_fused_steps_hold_less() -> None:
    """What the search for the largest batch compares, on real steps: measured 18 and 53 MiB.

    In a process of its own, whose freed memory goes back to the system at once: what other tests left would hide some of it.
    """
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", PEAKS],
        env={**os.environ, "PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    fused, eager = (int(number) for number in found.stdout.split())
    print(fused, eager)
    assert 0 < 2 * fused < eager


def test_what_a_row_of_steps_says_when_it_cannot_run() -> None:
    (case,) = language_steps.SMOKE
    table = markdown(records(case, [Row("plain", [1.0]), Row("kd", cannot_run="no | memory")]))
    assert "| KD | cannot run: no / memory |" in table
