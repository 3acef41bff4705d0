"""Several teachers: weights and routes by hand, and the adoption of Dynamic KD (arXiv 2109.11295)."""

import math

import pytest
import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.methods import build_methods, method_class
from tests.methods.by_hand import (  # fmt: skip
    CLASSES,
    ROWS,
    STUDENT,
    TEACHER,
    Rows,
    assert_split_changes_nothing,
    build,
    one_term,
    total,
)

BOTH = {"teacher": 3.0, "small": 1.0}


def divergences(rows: Rows, temperature: float) -> dict[str, Tensor]:
    """T^2 KL of every row from each teacher in float64."""
    q = (rows.logits.detach().double() / temperature).log_softmax(1)
    found = {}
    for name, logits in (("teacher", rows.teacher_logits), ("small", rows.small_logits)):
        p = (logits.double() / temperature).softmax(1)
        found[name] = temperature**2 * (p * (p.log() - q)).sum(1)
    return found


def test_teachers_by_weight() -> None:
    rows = Rows()
    method = build("routed", teacher_weights=BOTH, temperature=2.0, kd_weight=0.5, ce_weight=0.0)
    of = divergences(rows, 2.0)
    expected = 0.5 * float((0.75 * of["teacher"] + 0.25 * of["small"]).sum())
    assert float(total(method, rows).detach()) == pytest.approx(expected, rel=1e-5)


def test_teachers_by_a_column_of_the_data() -> None:
    rows = Rows()
    method = build("routed", teacher_weights=BOTH, by_route=True, temperature=2.0, ce_weight=0.0)
    of = divergences(rows, 2.0)
    expected = sum(float(of[name][row]) for row, name in enumerate(rows.route))
    assert float(total(method, rows).detach()) == pytest.approx(expected, rel=1e-5)
    rows.route = None  # type: ignore[assignment]
    with pytest.raises(KdtrainError, match=r"set data.route to a column of names of teachers"):
        one_term(method, rows, "ce")


@pytest.mark.parametrize("adoption", ["hard", "soft", "soft_instance"])
def test_adoption_2109_11295(adoption: str) -> None:
    rows = Rows()
    p = rows.logits.detach().double().softmax(1)
    u = -(p * p.log()).sum(1) / math.log(CLASSES)
    if adoption == "hard":
        small = torch.zeros(ROWS, dtype=torch.float64)
        small[u.topk(ROWS // 2).indices] = 1.0
    else:
        small = u if adoption == "soft_instance" else u.mean().expand(ROWS)
    of = divergences(rows, 2.0)
    expected = float((small * of["small"] + (1 - small) * of["teacher"]).sum())
    method = build("dynamic_teachers", adoption=adoption, ce_weight=0.0)
    assert float(total(method, rows).detach()) == pytest.approx(expected, rel=1e-5)
    assert_split_changes_nothing(method, rows)


@pytest.mark.parametrize("by_route", [False, True])
def test_a_split_batch_has_the_gradient_of_the_whole(by_route: bool) -> None:
    assert_split_changes_nothing(build("routed", teacher_weights=BOTH, by_route=by_route), Rows())


def test_bad_teachers_are_refused() -> None:
    kind = method_class("routed").Options
    with pytest.raises(KdtrainError, match=r"method.teacher_weights must have a sum above 0"):
        kind.parse({"name": "routed", "teacher_weights": {"teacher": 0.0}}, "method.")
    two = method_class("dynamic_teachers").Options
    with pytest.raises(KdtrainError, match=r"method.large and method.small are both teacher"):
        two.parse({"name": "dynamic_teachers", "small": "teacher"}, "method.")
    with pytest.raises(KdtrainError, match=r"method dynamic_teachers needs a teacher; set small.path"):
        build_methods([two()], "classification", STUDENT, {"teacher": TEACHER})  # type: ignore[call-arg]
