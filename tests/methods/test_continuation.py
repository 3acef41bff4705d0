"""Continuation KD (arXiv 2212.05998) and Annealing KD (arXiv 2104.07163): schedules and the hinge, by hand."""

import pytest

from kdtrain.methods.base import Step
from tests.methods.by_hand import Rows, assert_split_changes_nothing, build, one_term


@pytest.mark.parametrize(("epoch", "phi", "psi"), [(0, 0.1, 0.0), (2, 0.1, 0.05), (3, 0.2, 0.075), (20, 0.7, 0.5), (21, 0.8, 1.0), (29, 1.0, 1.0)])  # fmt: skip
def test_the_schedule_of_glue_2212_05998(epoch: int, phi: float, psi: float) -> None:
    """30 epochs and T_max = 10: phi = 1 - (T_i - 1) / 10, T_i falls by 1 every 3 epochs; psi = i / 40 up to 20, then 1."""
    step = Step(number=epoch, total=31)
    method = build("continuation")
    assert method.phi(step) == pytest.approx(phi)  # type: ignore[operator]
    assert method.weights(step) == {"ce": pytest.approx(psi), "logits": pytest.approx(1 - psi)}


def test_the_hinge_2212_05998() -> None:
    rows, step = Rows(), Step(number=5, total=31)
    method = build("continuation", margin=4.0)
    z, t = rows.logits.detach().double(), rows.teacher_logits.double()
    squared = (z - 0.2 * t).square().sum(1)
    expected = (squared - 4.0 * 0.2).clamp_min(0).sum()
    assert float((squared < 0.8).sum()) >= 0
    assert float(one_term(method, rows, "logits", step).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_annealing_2104_07163() -> None:
    method = build("annealing", stages=4, labels_from=0.5)
    steps = [Step(number, 101) for number in range(101)]
    phis = [method.phi(step) for step in steps]  # type: ignore[operator]
    assert phis[0] == 0.25 and phis[13] == 0.5 and phis[26] == 0.75 and phis[38] == phis[-1] == 1.0
    assert method.weights(steps[50]) == {"ce": 0.0, "logits": 1.0}
    assert method.weights(steps[51]) == {"ce": 1.0, "logits": 0.0}


@pytest.mark.parametrize("name", ["continuation", "annealing"])
def test_a_split_batch_has_the_gradient_of_the_whole(name: str) -> None:
    assert_split_changes_nothing(build(name), Rows(), Step(7, 31))
