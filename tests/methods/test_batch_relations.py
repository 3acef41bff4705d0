"""Methods that compare the rows of a batch: arXiv 1904.05068 (RKD), 1907.09682 (SP), 2005.00727 (PKT)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Step
from tests.methods.by_hand import ROWS, Rows, assert_split_changes_nothing, build, one_term


def sides(rows: Rows) -> tuple[Tensor, Tensor]:
    """States of the last pair of layers in float64."""
    return rows.states[2].detach().double(), rows.teacher_states[4].double()


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def test_rkd_1904_05068() -> None:
    rows = Rows()
    found = float(one_term(build("rkd", distance_weight=25.0, angle_weight=50.0), rows, "relation").detach())
    pairs = list(itertools.permutations(range(ROWS), 2))
    triples = list(itertools.permutations(range(ROWS), 3))
    distance = angle = 0.0
    scales = [sum(float((f[i] - f[j]).norm()) for i, j in pairs) / len(pairs) for f in sides(rows)]
    for i, j in pairs:
        ours, theirs = (
            float((f[i] - f[j]).norm()) / scale for f, scale in zip(sides(rows), scales, strict=True)
        )
        distance += huber(ours - theirs)
    for i, j, k in triples:
        ours, theirs = (
            float(F.normalize(f[i] - f[j], dim=0) @ F.normalize(f[k] - f[j], dim=0)) for f in sides(rows)
        )
        angle += huber(ours - theirs)
    # The reference implementation averages over all pairs and triples, equal ones (of value 0) included.
    expected = ROWS * (25 * distance / ROWS**2 + 50 * angle / ROWS**3)
    assert found == pytest.approx(expected, rel=1e-4)


def test_sp_1907_09682() -> None:
    rows = Rows()
    grams = [F.normalize(f @ f.T, dim=1) for f in sides(rows)]
    expected = ROWS * float((grams[0] - grams[1]).square().mean())
    assert float(one_term(build("sp"), rows, "relation").detach()) == pytest.approx(expected, rel=1e-4)


def neighbours(features: Tensor, kernel: str) -> Tensor:
    """p_{j|i} of arXiv 2005.00727, the row itself included as in its code."""
    if kernel == "cosine":
        unit = F.normalize(features, dim=1)
        similarity = (unit @ unit.T + 1) / 2
    else:
        similarity = 1 / (1 + torch.cdist(features, features))
    return similarity / similarity.sum(1, keepdim=True)


@pytest.mark.parametrize("kernel", ["cosine", "student_t", "combined"])
def test_pkt_2005_00727(kernel: str) -> None:
    rows = Rows(((1, 2), (2, 4)))
    method = build("pkt", kernel=kernel, layer_map=((1, 2), (2, 4)), early_weight=100.0, early_decay=0.7)
    step = Step(30, 60, 3.5)
    expected = 0.0
    for (ours, theirs), weight in (((1, 2), 100 * 0.7**3), ((2, 4), 1.0)):
        for one in ("cosine", "student_t") if kernel == "combined" else (kernel,):
            p, q = (
                neighbours(f.detach().double(), one) for f in (rows.teacher_states[theirs], rows.states[ours])
            )
            expected += weight * float(((p - q) * (p.log() - q.log())).mean())
    found = float(one_term(method, rows, "relation", step).detach())
    assert found == pytest.approx(expected * ROWS, rel=1e-3)


@pytest.mark.parametrize("name", ["rkd", "sp", "pkt"])
def test_a_split_batch_has_the_gradient_of_the_whole(name: str) -> None:
    assert_split_changes_nothing(build(name), Rows())


@pytest.mark.parametrize("name", ["rkd", "sp", "pkt"])
def test_layers_that_do_not_exist(name: str) -> None:
    with pytest.raises(KdtrainError, match=r"holds \[3, 1\], but the student has layers 1 to 2"):
        build(name, layer_map=((3, 1),))


def test_the_early_weight_ends() -> None:
    method, rows = build("pkt", layer_map=((1, 2), (2, 4))), Rows(((1, 2), (2, 4)))
    first, late = (
        float(one_term(method, rows, "relation", Step(0, 9, epoch)).detach()) for epoch in (0.0, 60.0)
    )
    last = float(one_term(build("pkt"), Rows(((1, 2), (2, 4))), "relation").detach())
    assert late == pytest.approx(last, rel=1e-3)
    assert first > 10 * late and math.isfinite(first)
