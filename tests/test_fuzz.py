"""Random calls: the first ones are right, a planted defect is found, shrunk and printed as a call that repeats it."""

import dataclasses
import re

import pytest
from torch import Tensor

from benchmarks import fuzz
from benchmarks.fuzz import Case, check, draw


def test_the_first_cases_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "40", "--start", "200"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.startswith("40 cases in")


def test_every_function_option_and_form_is_drawn() -> None:
    drawn = [draw(number) for number in range(2000)]
    for field in dataclasses.fields(Case):
        if field.name not in ("seed", "impl"):
            values = {getattr(case, field.name) for case in drawn}
            assert len(values) > 1, field.name
    assert {case.function for case in drawn} == set(fuzz.FUNCTIONS)
    assert {case.divergence for case in drawn} == set(fuzz.DIVERGENCES)


def test_a_planted_defect_is_found_and_shrunk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A temperature squared that is missing from the gradient alone."""
    right = fuzz.results

    def wrong(inputs: list[Tensor], call, impl: str) -> tuple[Tensor, ...]:
        loss, *gradients = right(inputs, call, impl)
        return loss, *(one / temperature**2 if impl == "torch" else one for one in gradients)

    case = next(
        case
        for case in map(draw, range(1000))
        if case.function == "kd_loss"
        and case.temperature == 2.0
        and case.ignored < 1.0
        and case.kd_weight > 0
    )
    temperature = case.temperature
    monkeypatch.setattr(fuzz, "results", wrong)
    assert fuzz.main(["--cases", "1", "--start", str(case.seed)]) == 1
    printed = capsys.readouterr().out
    found = re.search(r"check\((Case\(.*\))\)  # gradient 0", printed)
    assert found, printed
    smallest = eval(found[1])
    given = [field for field in dataclasses.fields(Case) if getattr(smallest, field.name) != field.default]
    assert len(given) <= 2, "the seed, and nothing that the defect does not need"
    assert check(smallest), "the printed call fails again"
    monkeypatch.undo()
    assert check(smallest) is None


def test_a_refusal_is_no_failure() -> None:
    with pytest.raises(fuzz.Refused, match="kd_weight"):
        fuzz.fails(dataclasses.replace(Case(), kd_weight=float("nan")))


def test_a_crash_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("out of bounds")

    monkeypatch.setattr(fuzz, "results", crash)
    assert fuzz.fails(Case()) == "RuntimeError: out of bounds"
