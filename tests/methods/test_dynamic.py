"""Dynamic KD (arXiv 2109.11295): selection before the teacher runs, and weights by uncertainty."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from kdtrain.methods.base import Step
from kdtrain.methods.dynamic_selection import uncertainty
from tests.methods.by_hand import CLASSES, ROWS, Rows, assert_split_changes_nothing, build, one_term

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.4, 0.4, 0.2]])


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("entropy", [1.0297, 0.3944, 1.0549]),
        ("margin", [-0.2, -0.85, 0.0]),
        ("confidence", [0.5, 0.1, 0.6]),
    ],
)
def test_three_scores_2109_11295(score: str, expected: list[float]) -> None:
    assert uncertainty(PROBABILITIES.log(), score).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_uncertain_half_is_kept_in_order() -> None:
    rows = torch.tensor([10, 11, 12, 13, 14, 15])
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])
    kept = build("dynamic_selection", ratio=0.5).select(Step(), rows, scores)
    assert kept.tolist() == [11, 13, 15]
    one = build("dynamic_selection", ratio=0.01).select(Step(), rows, scores)
    assert one.tolist() == [11]
    drawn = [
        build("dynamic_selection", score="random").select(Step(n), rows, scores).tolist() for n in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3


@pytest.mark.parametrize("swapped", [False, True])
def test_weights_by_uncertainty_2109_11295(swapped: bool) -> None:
    rows = Rows(((1, 2), (2, 4)))
    method = build("dynamic_weights", temperature=2.0, swapped=swapped)
    z, t = rows.logits.detach().double(), rows.teacher_logits.double()
    p = z.softmax(1)
    u = -(p * p.log()).sum(1) / math.log(CLASSES)
    of_states, of_labels = (1 - u, u) if swapped else (u, 1 - u)
    p_t, p_s = ((side / 2).softmax(1) for side in (t, z))
    kd = 4 * ((p_t * (p_t / p_s).log()).sum(1) * of_labels).sum()
    assert float(one_term(method, rows, "kd").detach()) == pytest.approx(float(kd), rel=1e-5)
    feature = torch.zeros((), dtype=torch.float64)
    for (ours, theirs), projection in zip(((1, 2), (2, 4)), method.projections, strict=True):  # type: ignore[arg-type]
        mapped = projection(rows.teacher_states[theirs]).detach().double()
        errors = (normalize(rows.states[ours].detach().double()) - normalize(mapped)).square().mean(1)
        feature += (errors * of_states).sum()
    assert float(one_term(method, rows, "feature").detach()) == pytest.approx(float(feature) / 2, rel=1e-4)


def test_no_gradient_passes_through_the_uncertainty() -> None:
    rows = Rows(((1, 2), (2, 4)))
    term = one_term(build("dynamic_weights"), rows, "feature")
    assert torch.autograd.grad(term, rows.logits, allow_unused=True) == (None,)


def test_a_split_batch_has_the_gradient_of_the_whole() -> None:
    assert_split_changes_nothing(build("dynamic_weights"), Rows(((1, 2), (2, 4))))
    assert ROWS == 9
