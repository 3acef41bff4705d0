"""DPK (arXiv 2206.06067): which positions are given, the similarity that sets their number, and invariance to a split."""

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.methods.base import Step
from kdtrain.methods.dpk import DynamicPrior, similarity
from kdtrain.methods.sampling import uniform
from kdtrain.models.loading import Shape
from tests.methods.by_hand import ROWS, TEACHER, Rows, assert_split_changes_nothing, build, one_term

PAIRS = ((1, 2), (2, 4))
STEP = Step(number=3, total=9, seed=1)


def method_of(**options: float) -> DynamicPrior:
    method = build("dpk", **options)
    assert isinstance(method, DynamicPrior)
    return method


def sides(rows: Rows, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised states of both sides at the tokens that both have, and the mask."""
    ours, theirs = PAIRS[number]
    mask = rows.mask & rows.teacher_mask[:, :6]
    z, t = rows.tokens[ours].detach(), rows.teacher_tokens[theirs][:, :6]
    return layer_norm(z, z.shape[2:]), layer_norm(t, t.shape[2:]), mask


def test_the_similarity_is_linear_cka() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 3)), generator.normal(size=(40, 5))
    y[:, :3] += x
    z = torch.from_numpy(np.concatenate([x, y, np.ones((40, 1))], axis=1))
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert float(similarity((z.T @ z).flatten(), 3)) == pytest.approx(expected)
    halves = (z[:13].T @ z[:13] + z[13:].T @ z[13:]).flatten()
    assert float(similarity(halves, 3)) == pytest.approx(expected), "the products add up"


def test_the_prior_follows_the_similarity_2206_06067() -> None:
    rows, method = Rows(tokens=PAIRS), method_of(decay=0.8)
    wanted = [0.5, 0.5]
    for number in range(2):
        one_term(method, rows, "feature", Step(number, 9))
        method.after_step(Step(number, 9), {})
        for pair in range(2):
            ours, theirs, mask = sides(rows, pair)
            a, b = ours[mask].double(), theirs[mask].double()
            a, b = a - a.mean(0), b - b.mean(0)
            cka = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
            wanted[pair] = 0.8 * wanted[pair] + 0.2 * float(cka)
        assert method.get_buffer("prior").tolist() == pytest.approx(wanted, rel=1e-4)
    assert float(method.logged()["prior"]) == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_reconstruction_of_the_mixture_2206_06067() -> None:
    rows, method = Rows(tokens=PAIRS), method_of()
    method.get_buffer("prior").copy_(torch.tensor([0.3, 0.8]))
    expected = 0.0
    for number, stage in enumerate(method.stages):
        ours, theirs, mask = sides(rows, number)
        for row in range(ROWS):
            length = int(mask[row].sum())
            draws = uniform(length, STEP.seed, STEP.number, number, 0, row)
            given = draws > method.get_buffer("prior")[number]
            pair = [side[row : row + 1, :length] for side in (ours, theirs)]
            found = stage(*pair, given[None], torch.ones(1, length, dtype=torch.bool))
            expected += float((found - pair[1]).detach().double().square().mean()) / 2
    assert float(one_term(method, rows, "feature", STEP).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_all_or_nothing_is_given(prior: float) -> None:
    """With a prior of 0 the teacher is given everywhere and the student gets no gradient; with 1 it is all the student's."""
    rows, method = Rows(tokens=PAIRS), method_of()
    method.get_buffer("prior").fill_(prior)
    gradients = torch.autograd.grad(one_term(method, rows, "feature", STEP), list(rows.tokens.values()))
    assert all((float(one.abs().max()) > 0) == (prior == 1.0) for one in gradients)


def test_a_split_batch_has_the_gradient_of_the_whole() -> None:
    assert_split_changes_nothing(method_of(), Rows(tokens=PAIRS), STEP)


def test_students_without_tokens_are_refused() -> None:
    kind = method_class("dpk")
    with pytest.raises(KdtrainError, match=r"needs a Transformer student; set student.architecture: roberta"):
        kind(kind.Options(), Shape(2, 8, embeddings=False), {"teacher": TEACHER})  # type: ignore[call-arg]
