"""pytest-benchmark entries at small shapes: `pytest benchmarks --benchmark-only`, and --benchmark-compare over commits."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case, make_inputs
from benchmarks.contenders import CONTENDERS


# The floor and the eager lines stand beside ours, so that a comparison between commits shows whose time moved.
@pytest.mark.parametrize("contender", ["products", "ours", "eager"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_linear_kd_loss(benchmark: BenchmarkFixture, divergence: str, contender: str) -> None:
    benchmark.group = f"linear_kd {divergence}"
    case = Case(divergence, tokens=256, width=64, teacher_width=128, vocabulary=8000)
    inputs = make_inputs(case)
    step = CONTENDERS[contender](case, inputs)
    # A fresh gradient a round, as in training: adding into an old one would be one pass over the head more.
    benchmark.pedantic(step, setup=inputs.clear_gradients, rounds=10, warmup_rounds=2)
