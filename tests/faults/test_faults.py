"""A seeded sample of faults; `make faults` runs all of them."""

import random
from pathlib import Path

import pytest

from tests.faults.scenarios import SCENARIOS, Scenario, prepare
from tests.faults.trials import SURVIVED, all_trials, reference, trial

SAMPLE = 3
"""Trials of each scenario."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and teachers."""
    folder = tmp_path_factory.mktemp("shared")
    prepare(folder)
    return folder


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_sample_of_faults(scenario: Scenario, shared: Path, tmp_path: Path) -> None:
    made = reference(scenario, shared, tmp_path)
    generator = random.Random(scenario.name)
    failures = []
    for number, (fault, at) in enumerate(generator.sample(list(all_trials(made)), SAMPLE)):
        verdict, text = trial(made, tmp_path / str(number), fault, at, seed=number)
        if verdict not in SURVIVED:
            failures.append(f"{verdict}: {text}")
    assert not failures, "\n\n".join(failures)
