"""pytest-benchmark entries at small shapes: `pytest benchmarks --benchmark-only`, and --benchmark-compare over commits."""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import contextual, features, given_logits
from benchmarks.cases import Case
from benchmarks.operation import AnyCase
from benchmarks.registry import OPERATIONS

SMALL: dict[str, Any] = {"tokens": 256, "width": 64, "teacher_width": 128, "vocabulary": 8000}
CASES: tuple[AnyCase, ...] = (
    *(Case(name, **SMALL) for name in ("forward_kl", "reverse_kl", "jsd")),
    Case("none", operation="linear_ce", teacher="none", **SMALL),
    given_logits.Case(32, 20),
    features.Case("projection_mse", 4, 128, 128, 256),
    features.Case("relation_kl", 2, 128, 128, 256, 4),
    contextual.Case(2, 3, 64, 64, 128, window=4, layer_weight=1.0),
)
# The floor and the eager lines stand beside ours, so that a comparison between commits shows whose time moved.
ENTRIES = [
    pytest.param(case, contender, id=f"{case.name}: {contender}")
    for case in CASES
    for contender in (OPERATIONS[case.family].floor, "ours", "eager")
    if contender
]


@pytest.mark.parametrize(("case", "contender"), ENTRIES)
def test_operation(benchmark: BenchmarkFixture, case: AnyCase, contender: str) -> None:
    benchmark.group = case.name
    operation = OPERATIONS[case.family]
    inputs = operation.make_inputs(case)
    step, leaves = operation.contenders[contender](case, inputs), operation.leaves(case, inputs)

    # A fresh gradient a round, as in training: adding into an old one would be one pass over the head more.
    def clear_gradients() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    benchmark.pedantic(step, setup=clear_gradients, rounds=10, warmup_rounds=2)
