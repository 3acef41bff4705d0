"""MoKD (arXiv 2505.08170): the weights by a search over the segment, the combined gradient and the maps in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Step
from kdtrain.methods.mokd import shortest
from tests.methods.by_hand import ROWS, Rows, assert_split_changes_nothing, build, one_term


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_weights_are_of_the_shortest_vector_2505_08170(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    second = second * scale
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    best = float(shares[(shares * first + (1 - shares) * second).norm(dim=1).argmin()])
    assert float(shortest(first @ first, second @ second, first @ second)) == pytest.approx(best, abs=1e-4)


def test_equal_gradients_share_evenly() -> None:
    one = torch.tensor(2.0)
    assert float(shortest(one, one, one)) == 0.5


def test_the_step_is_fair_to_both_logarithms_2505_08170() -> None:
    rows = Rows()
    method = build("mokd", temperature=2.0)
    z, t = rows.logits.detach().double().requires_grad_(), rows.teacher_logits.double()
    p_t, p_s = (t / 2).softmax(1), (z / 2).log_softmax(1)
    losses = [
        4 * (p_t * (p_t.log() - p_s)).sum() / ROWS,
        torch.nn.functional.cross_entropy(z, rows.labels, reduction="sum", ignore_index=-100) / ROWS,
    ]
    wanted = [torch.autograd.grad(loss.log(), z, retain_graph=True)[0] for loss in losses]
    plain = [
        [torch.autograd.grad(one_term(method, rows, name), rows.logits)[0] / ROWS] for name in ("kd", "ce")
    ]
    values = {name: one_term(method, rows, name).detach() / ROWS for name in ("kd", "ce")}
    (found,), logged = method.combine(Step(), plain, values), method.logged()
    inner = [float((found.double() * one).sum()) for one in wanted]
    assert inner[0] == pytest.approx(inner[1], rel=1e-4)
    share = float(logged["distillation_share"])
    assert 0 < share < 1
    torch.testing.assert_close(
        found, (share * wanted[0] + (1 - share) * wanted[1]).float(), rtol=1e-4, atol=1e-6
    )
    raw = [gradient.flatten() * loss.detach() for gradient, loss in zip(wanted, losses, strict=True)]
    assert float(logged["gradient_cosine"]) == pytest.approx(
        float(torch.cosine_similarity(raw[0], raw[1], dim=0)), rel=1e-4
    )
    assert float(logged["gradient_norm_ratio"]) == pytest.approx(
        float(raw[0].norm() / raw[1].norm()), rel=1e-4
    )


def test_states_meet_in_a_subspace() -> None:
    rows = Rows()
    method = build("mokd", feature_weight=1.0, subspace_width=11)
    basis = method.get_buffer("basis_0").double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(7, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    (projection,) = method.projections  # type: ignore[misc]
    assert isinstance(projection, torch.nn.Linear)
    ours = normalize(projection(rows.states[2]).detach().double())
    theirs = normalize(rows.teacher_states[4].double() @ basis.T)
    found = float(one_term(method, rows, "feature").detach())
    assert found == pytest.approx(float((ours - theirs).square().sum()), rel=1e-4)


def test_amortised_weights_descend_on_the_printed_objective() -> None:
    method = build("mokd", gradients="amortised", share_rate=0.5, share_decay=0.1)
    assert method.gradient_groups == () and method.weights(Step(0)) == {"kd": 0.5, "ce": 0.5}
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for number, pair in enumerate([(3.0, 0.5), (2.0, 0.7)]):
        losses = torch.tensor(pair, dtype=torch.float64)
        objective = (logits.softmax(0) * losses.log()).sum().square() / 2
        (slope,) = torch.autograd.grad(objective, logits)
        logits = (logits - 0.5 * (slope + 0.1 * logits)).detach().requires_grad_()
        method.after_step(Step(number), {"kd": losses[0].float(), "ce": losses[1].float()})
    expected = (logits.softmax(0) / torch.tensor([2.0, 0.7])).tolist()
    assert method.weights(Step(2)) == pytest.approx(dict(zip(("kd", "ce"), expected, strict=True)))
    again = build("mokd", gradients="amortised")
    again.load_state_dict(method.state_dict())
    assert again.weights(Step(2)) == method.weights(Step(2)), "a resumed run has the same weights"


@pytest.mark.parametrize("gradients", ["exact", "amortised"])
def test_a_split_batch_has_the_gradient_of_the_whole(gradients: str) -> None:
    assert_split_changes_nothing(build("mokd", feature_weight=0.5, gradients=gradients), Rows())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kd_weight": 0.0}, "are both 0, so there is nothing to distil"),
        ({"feature_weight": 1.0, "subspace_width": 6}, "subspace_width is 6, below the 7 dimensions"),
        ({"feature_weight": 1.0, "layer_map": ((3, 4),)}, "the student has layers 1 to 2"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(KdtrainError, match=sentence):
        build("mokd", **options)
