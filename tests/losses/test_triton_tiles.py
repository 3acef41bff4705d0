"""The Triton kernels on tiles of the vocabulary, run by its interpreter, against the reference on whole rows in fp64."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels._triton.kd.tile_rows import tile_gradient, tile_statistics, tile_sums
from kdkernels.core.row_state import (
    CE_MAX,
    CE_SUM,
    LABEL,
    LOGIT_SUM,
    MEAN,
    SLOTS,
    TEACHER_LABEL,
    VALUE,
    Tile,
    new_state,
)
from kdkernels.divergences import JSD, Decoupled, Divergence, ForwardKL, SkewKL
from kdkernels.options import LogitTransform, RowTerms
from kdkernels.reference.logits import kd_row_terms
from tests.support.budget import assert_within_budget
from tests.support.rounding import truths
from tests.support.row_kernels import DEVICE, ROWS, SMALL, TILED, inputs, name, options_for, true_rows

# Tiles of more and of less than a block of 64 columns, one of them ragged.
CUTS = [0, 64, 100, 230]


def run(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    grad: Tensor,
    *,
    cuts: list[int],
    shared: int | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    row_weight: Tensor | None = None,
) -> Tensor:
    """The three passes over all tiles; the state."""
    state = new_state(ROWS, torch.float32, student.device)
    tiles = list(pairwise(cuts))
    shared = student.shape[1] if shared is None else shared

    def tile(start: int, stop: int) -> Tile:
        student_bias, teacher_bias = (None if bias is None else bias[start:stop] for bias in biases)
        other = teacher[:, start:stop] if stop <= shared else None
        return Tile(
            student[:, start:stop], other, labels, start, student_bias,
            None if other is None else teacher_bias, row_weight,
        )  # fmt: skip

    for cut in tiles:
        tile_statistics(tile(*cut), terms, state, config=SMALL)
    for cut in tiles:
        if tile(*cut).teacher is not None:
            tile_sums(tile(*cut), terms, state, config=SMALL)
    options = options_for(terms.divergence)
    for start, stop in tiles:
        tile_gradient(
            tile(start, stop),
            terms,
            state,
            vocabulary=student.shape[1],
            grad=grad[:, start:stop],
            config=SMALL,
            **options,
        )
    assert state.shape[0] == SLOTS
    return state


def check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, terms: RowTerms, state: Tensor, grad: Tensor,
    **options: Any,
) -> None:  # fmt: skip
    """Value, cross entropy and gradient against the reference; arguments as they were before the passes."""
    rest_only = dict(options)
    if isinstance(terms.divergence, Decoupled):  # VALUE is that of the distributions without the label
        both = options_for(terms.divergence)["decoupled"]
        options["decoupled"] = both
        rest_only["decoupled"] = (torch.zeros_like(both[0]), torch.ones_like(both[1]))
    wide = student.double(), teacher.double()
    exact = truths(lambda: kd_row_terms(*wide, labels, None, terms, **rest_only))
    assert_within_budget(state[VALUE], exact[0], "divergence")
    if labels is not None and terms.ce_weight != 0.0:
        ce = state[CE_MAX] - state[LABEL] + state[CE_SUM].log()
        ce -= terms.label_smoothing * (state[LOGIT_SUM] / student.shape[1] - state[LABEL])
        assert_within_budget(ce, exact[1], "cross entropy")
    weight = options.pop("weight", None)
    assert_within_budget(grad, true_rows(student, teacher, labels, terms, weight, **options)[1], "gradient")


@pytest.mark.parametrize("divergence", TILED, ids=name)
# At 1 the kernel still keeps two sums; with smoothing, biases and transforms, and without.
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all options"])
def test_tiles_equal_rows(divergence: Divergence, plain: bool):
    student, teacher, labels = inputs(230)
    labels[0], labels[1] = 99, 100  # at the ends of two tiles
    biases = (None, None)
    terms = RowTerms(divergence, 1.0, ce_weight=0.5)
    whole = (student.clone(), teacher)
    if not plain:
        biases = (torch.randn(230, device=DEVICE), torch.randn(230, device=DEVICE))
        cap, scale = LogitTransform(1.5, 12.0), LogitTransform(0.5)
        terms = RowTerms(divergence, 2.0, 0.8, 0.5, True, 0.1, cap, scale)
        whole = (student + biases[0], teacher + biases[1])
    state = run(student, teacher, labels, terms, student, cuts=CUTS, biases=biases)
    check(*whole, labels, terms, state, student)


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3), Decoupled()], ids=name)
def test_tiles_behind_the_shared_prefix(divergence: Divergence):
    student, teacher, labels = inputs(230)
    teacher = teacher[:, :100]
    labels[0], labels[1] = 20, 210
    terms = RowTerms(
        divergence, 2.0, ce_weight=0.5, label_smoothing=0.1, student_transform=LogitTransform(0.5, 9.0)
    )
    kept = student.clone()
    state = run(student, teacher, labels, terms, student, cuts=CUTS, shared=100)
    if isinstance(divergence, Decoupled):
        assert state[TEACHER_LABEL, 1] == float("inf") and state[TEACHER_LABEL, 0] == teacher[0, 20]
    check(kept, teacher, labels, terms, state, student, vocab_map=100)


def test_without_labels_nothing_is_written_behind_the_prefix():
    student, teacher, _ = inputs(230)
    kept = student.clone()
    state = run(student, teacher[:, :100], None, RowTerms(ForwardKL()), student, cuts=CUTS, shared=100)
    assert torch.equal(student[:, 100:], torch.zeros_like(student[:, 100:]))
    check(kept, teacher[:, :100], None, RowTerms(ForwardKL()), state, student, vocab_map=100)


@pytest.mark.parametrize("divergence", [ForwardKL(), SkewKL(0.2), Decoupled()], ids=name)
def test_rows_that_do_not_count_are_not_read(divergence: Divergence):
    student, teacher, labels = inputs(230)
    weight = torch.tensor([0.5, 0.0, -2.0], device=DEVICE)
    terms, kept = RowTerms(divergence, 2.0, ce_weight=0.5), student.clone()
    broken = student.clone()
    broken[1], labels_broken = float("nan"), labels.clone()
    labels_broken[1] = -100
    state = run(broken, teacher, labels_broken, terms, broken, cuts=CUTS, row_weight=weight)
    assert torch.equal(broken[1], torch.zeros_like(broken[1]))
    assert torch.equal(state[:, 1], new_state(1, torch.float32, student.device)[:, 0])
    options = options_for(divergence)
    exact = true_rows(kept, teacher, labels, terms, weight, **options)[1]
    assert_within_budget(broken[[0, 2]], exact[[0, 2]], "gradient")


def test_half_gradient_over_a_tile():
    """A buffer that holds one tile at a time, and its half alias."""
    student, teacher, labels = inputs(230)
    terms = RowTerms(SkewKL(0.3), 2.0, ce_weight=0.5)
    grad = torch.empty_like(student)
    state = run(student, teacher, labels, terms, grad, cuts=CUTS)
    buffer = torch.full((ROWS, 144), float("nan"), device=DEVICE)
    buffer[:, :130] = student[:, 100:]
    half = buffer.view(torch.bfloat16)[:, :130]
    tile = Tile(buffer[:, :130], teacher[:, 100:], labels, 100)
    tile_gradient(tile, terms, state, vocabulary=230, grad=half, config=SMALL)
    rounded = grad[:, 100:]
    torch.testing.assert_close(half.float(), rounded, rtol=2.0**-8, atol=0.0)  # rounded once
    assert buffer[:, 130:].isnan().all()


def test_maxima_that_move_between_tiles():
    """Tiles of -inf only, and tiles far above all before."""
    student, teacher, labels = inputs(230)
    student[:, :64] = teacher[:, :64] = -1e30
    student[:, 150] += 500
    teacher[:, 160] += 300
    student[:, 170], teacher[:, 170] = 490.0, 290.0
    labels[:] = 120
    terms = RowTerms(JSD(0.4), 20.0, ce_weight=0.5)
    grad = torch.empty_like(student)
    excluded = (student == -1e30, teacher == -1e30)
    student_seen = student.masked_fill(excluded[0], float("-inf"))
    teacher_seen = teacher.masked_fill(excluded[1], float("-inf"))
    state = run(student_seen, teacher_seen, labels, terms, grad, cuts=CUTS)
    assert state[MEAN].isfinite().all()
    check(student, teacher, labels, terms, state, grad)
