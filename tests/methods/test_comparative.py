"""Comparative KD (arXiv 2311.02253) against loops over pairs, and the groups of the authors' code."""

import itertools

import pytest
import torch

from kdtrain.methods.base import Step
from tests.methods.by_hand import CLASSES, ROWS, Rows, assert_split_changes_nothing, build, one_term


def one_hot(label: int) -> torch.Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[label]


def test_all_pairs_2311_02253() -> None:
    rows = Rows()
    z, t = rows.logits.detach().double(), rows.teacher_logits.double()
    method = build("comparative")
    pairs = itertools.product(range(ROWS), repeat=2)
    expected = sum(float(((z[i] - z[j]) - (t[i] - t[j])).square().mean()) for i, j in pairs) / ROWS**2
    assert float(one_term(method, rows, "difference").detach()) == pytest.approx(ROWS * expected, rel=1e-5)
    labelled = [i for i in range(ROWS) if i != 3]
    expected = (
        sum(
            float(
                ((z[i] - z[j]) - (one_hot(int(rows.labels[i])) - one_hot(int(rows.labels[j]))))
                .square()
                .mean()
            )
            for i, j in itertools.product(labelled, repeat=2)
        )
        / len(labelled) ** 2
    )
    assert float(one_term(method, rows, "label").detach()) == pytest.approx(ROWS * expected, rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_sampled_groups_2311_02253(size: int) -> None:
    rows, step = Rows(), Step(number=4, total=10)
    z, t = rows.logits.detach().double(), rows.teacher_logits.double()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(4)).tolist()
    values = []
    for first in range(0, ROWS // size * size, size):
        a, *b = order[first : first + size]
        ours, theirs = (side[a] - side[b].mean(0) for side in (z, t))
        values.append(float((ours - theirs).square().mean()))
    method = build("comparative", groups="sampled", group_size=size)
    found = float(one_term(method, rows, "difference", step).detach())
    assert found == pytest.approx(ROWS * sum(values) / len(values), rel=1e-5)


@pytest.mark.parametrize("groups", ["pairs", "sampled"])
def test_a_split_batch_has_the_gradient_of_the_whole(groups: str) -> None:
    assert_split_changes_nothing(build("comparative", groups=groups, ce_weight=0.5, kd_weight=0.3), Rows())
