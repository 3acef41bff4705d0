"""Methods on the states of every token: arXiv 1612.03928 (AT) and FSP (Yim et al. 2017), text by text in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.models.loading import Shape
from tests.methods.by_hand import ROWS, STUDENT, Rows, assert_split_changes_nothing, build, one_term

PAIRS = ((1, 2), (2, 4))


def text(rows: Rows, row: int, layer: int, *, teacher: bool) -> Tensor:
    """(n, D) float64, without padding."""
    states, mask = (rows.teacher_tokens, rows.teacher_mask) if teacher else (rows.tokens, rows.mask)
    return states[layer][row].detach().double()[mask[row]]


def test_attention_transfer_1612_03928() -> None:
    rows, expected = Rows(tokens=PAIRS), 0.0
    for ours, theirs in PAIRS:
        for row in range(ROWS):
            maps = []
            for teacher, layer in ((False, ours), (True, theirs)):
                activity = normalize(text(rows, row, layer, teacher=teacher).square().mean(1), dim=0)
                maps.append(torch.cat([activity, torch.zeros(10 - len(activity), dtype=torch.float64)]))
            expected += float((maps[0] - maps[1]).square().sum()) / 2
    assert float(one_term(build("at"), rows, "map").detach()) == pytest.approx(expected, rel=1e-5)


def test_flow_2017() -> None:
    rows = Rows(tokens=PAIRS, teacher_width=STUDENT.width)
    kind = method_class("fsp")
    method = kind(kind.Options(), STUDENT, {"teacher": Shape(4, STUDENT.width)})  # type: ignore[call-arg]
    expected = 0.0
    for row in range(ROWS):
        flows = []
        for teacher, (first, second) in ((False, (1, 2)), (True, (2, 4))):
            a, b = (text(rows, row, layer, teacher=teacher) for layer in (first, second))
            flows.append(a.T @ b / len(a))
        expected += float((flows[0] - flows[1]).square().mean())
    assert float(one_term(method, rows, "flow").detach()) == pytest.approx(expected, rel=1e-5)
    assert_split_changes_nothing(method, rows)


def test_a_split_batch_has_the_gradient_of_the_whole() -> None:
    assert_split_changes_nothing(build("at"), Rows(tokens=PAIRS))


def test_flow_of_unequal_widths_is_refused() -> None:
    with pytest.raises(
        KdtrainError, match=r"the student has 5 of them, the teacher 7; set student.hidden_size to 7"
    ):
        build("fsp")
    kind = method_class("fsp")
    with pytest.raises(KdtrainError, match=r"needs two pairs of layers or more, got \[\[2, 4\]\]"):
        kind(kind.Options(layer_map=((2, 4),)), STUDENT, {"teacher": Shape(4, 5)})  # type: ignore[call-arg]


def test_teachers_without_tokens_are_refused() -> None:
    kind = method_class("at")
    with pytest.raises(
        KdtrainError, match="method at reads the teacher token by token and needs a Transformer"
    ):
        kind(kind.Options(), STUDENT, {"teacher": Shape(4, 5, embeddings=False)})  # type: ignore[call-arg]
