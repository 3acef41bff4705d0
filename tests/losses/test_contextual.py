"""`contextual_relation_loss`: the study's formula, masks, edges, and every back end against the reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from kdkernels import contextual_relation_loss
from kdkernels.options import Impl
from kdkernels.reference.relation_counts import Variant
from tests.support.inputs import DEVICE, IMPLS

VARIANTS: list[Variant] = ["study", "official"]


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def study_relations(side: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cosine distances and cosines of angles as the study computes them, one neighbour after the other."""
    length = side.shape[2]
    offsets = range(-window, window + 1) if window < length else range(length)
    directions, products, steps = F.normalize(side, dim=-1), [], []
    for offset in offsets:
        product, step = [], []
        for position in range(length):
            other = position + offset if window < length else offset
            inside = 0 <= other < length
            product.append(
                (directions[:, :, position] * directions[:, :, other]).sum(-1)
                if inside
                else side.new_zeros(side.shape[:2])
            )
            step.append(
                side[:, :, position] - side[:, :, other] if inside else torch.zeros_like(side[:, :, 0])
            )
        products.append(torch.stack(product, 2))
        steps.append(F.normalize(torch.stack(step, 2), dim=-1))
    between = torch.stack(steps, 3)  # (B, L, N, V, D)
    return 1.0 - torch.stack(products, 3), between @ between.transpose(-1, -2)


def study_loss(student: Tensor, teacher: Tensor, window: int, layer_weight: float) -> Tensor:
    """WR + layer_weight * LTR, both terms of each a plain mean squared error."""
    total = student.new_zeros(())
    for weight, sides in (
        (1.0, (student, teacher)),
        (layer_weight, (student.transpose(1, 2), teacher.transpose(1, 2))),
    ):
        (distance_s, angle_s), (distance_t, angle_t) = (study_relations(side, window) for side in sides)
        total = total + weight * (F.mse_loss(distance_s, distance_t) + F.mse_loss(angle_s, angle_t))
    return total


# Windows: within both axes, all pairs of layers only, reaching over the ends of every sequence, and all pairs of both.
# Triton's interpreter is slow: it takes one window within both axes, and all pairs of both.
@pytest.mark.parametrize(
    ("impl", "window"),
    [
        (impl, window)
        for impl in IMPLS
        for window in (1, 3, 6, 7, 20)
        if impl != "triton" or window in (1, 20)
    ],
)
def test_equals_the_formula_of_the_study(impl: Impl, window: int) -> None:
    student, teacher = features(2, 3, 7, 5, dtype=torch.float64), features(2, 3, 7, 8, dtype=torch.float64)
    dtype = torch.float32 if impl == "triton" else torch.float64
    leaf = student.to(dtype).requires_grad_()
    loss = contextual_relation_loss(leaf, teacher.to(dtype), window=window, layer_weight=0.7, impl=impl)
    student.requires_grad_()
    expected = study_loss(student, teacher, window, 0.7)
    rtol, atol = (1e-5, 1e-6) if impl == "triton" else (1e-9, 1e-12)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)
    (gradient,), (truth,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient.double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_pick_the_terms(impl: Impl) -> None:
    student, teacher = features(2, 3, 9, 5), features(2, 3, 9, 4)
    (distance_s, angle_s), (distance_t, angle_t) = (study_relations(side, 2) for side in (student, teacher))
    transposed = [study_relations(side.transpose(1, 2), 2) for side in (student, teacher)]

    def term(distance: float, angle: float, layer: float) -> Tensor:
        return contextual_relation_loss(
            student,
            teacher,
            window=2,
            distance_weight=distance,
            angle_weight=angle,
            layer_weight=layer,
            impl=impl,
        )

    torch.testing.assert_close(term(2.0, 0.0, 0.0), 2.0 * F.mse_loss(distance_s, distance_t))
    torch.testing.assert_close(term(0.0, 3.0, 0.0), 3.0 * F.mse_loss(angle_s, angle_t))
    layer = F.mse_loss(transposed[0][0], transposed[1][0])
    torch.testing.assert_close(term(1.0, 0.0, 0.5), F.mse_loss(distance_s, distance_t) + 0.5 * layer)
    assert term(0.0, 0.0, 1.0) == 0.0


def masked_loss(student: Tensor, teacher: Tensor, mask: Tensor, window: int) -> Tensor:
    """WR + 0.5 LTR by the definition: every relation of counted positions, one at a time."""

    def relations(student: Tensor, teacher: Tensor, groups: list[Tensor]) -> Tensor:
        distances, angles = [], []
        for group, side_s, side_t in zip(groups, student, teacher, strict=True):
            for i in group.tolist():
                near = [int(j) for j in group if abs(int(j) - i) <= window]
                for j in near:
                    pairs = [F.cosine_similarity(side[i], side[j], dim=0) for side in (side_s, side_t)]
                    distances.append((pairs[0] - pairs[1]).square())
                    for k in near:
                        if i in (j, k):
                            angles.append(student.new_zeros(()))
                            continue
                        pairs = [
                            F.cosine_similarity(side[j] - side[i], side[k] - side[i], dim=0)
                            for side in (side_s, side_t)
                        ]
                        angles.append((pairs[0] - pairs[1]).square())
        return torch.stack(distances).mean() + torch.stack(angles).mean()

    batch, layers, length = student.shape[:3]
    word = relations(
        student.flatten(0, 1),
        teacher.flatten(0, 1),
        [mask[b].nonzero().squeeze(1) for b in range(batch) for _ in range(layers)],
    )
    everything = torch.arange(layers)
    kept = [everything[: layers * int(mask[b, n])] for b in range(batch) for n in range(length)]
    return word + 0.5 * relations(
        student.transpose(1, 2).flatten(0, 1), teacher.transpose(1, 2).flatten(0, 1), kept
    )


# Windows smaller than either axis, than one, and larger than both. A hole in the mask, and a padded end.
@pytest.mark.parametrize(
    ("impl", "window"),
    [(impl, window) for impl in IMPLS for window in (1, 3, 9) if impl != "triton" or window == 3],
)
def test_mask_counts_existing_relations(impl: Impl, window: int) -> None:
    student, teacher = features(2, 3, 6, 4), features(2, 3, 6, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=DEVICE).bool()
    loss = contextual_relation_loss(student, teacher, window=window, mask=mask, layer_weight=0.5, impl=impl)
    torch.testing.assert_close(loss, masked_loss(student, teacher, mask, window))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_samples_can_count_alike(impl: Impl, masked: bool) -> None:
    """The mean of what each sample gives alone; a sample without a token is one of them and adds nothing."""
    student, teacher = features(3, 2, 6, 4).requires_grad_(), features(3, 2, 6, 5)
    mask = torch.arange(6, device=DEVICE) < torch.tensor([[6], [3], [0]], device=DEVICE)
    options = {"window": 2, "layer_weight": 0.5, "impl": impl}
    loss = contextual_relation_loss(
        student, teacher, mask=mask if masked else None, average="samples", **options
    )
    (gradient,) = torch.autograd.grad(loss, student)
    alone = [
        contextual_relation_loss(
            student[[one]], teacher[[one]], mask=mask[[one]] if masked else None, **options
        )
        for one in range(3)
    ]
    expected = torch.stack(alone).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-5, atol=1e-8)


# The official variant differs in arithmetic that both back ends share, so Triton's slow interpreter takes one.
@pytest.mark.parametrize(
    ("impl", "variant"),
    [(impl, variant) for impl in IMPLS for variant in VARIANTS if (impl, variant) != ("triton", "official")],
)
def test_padding_may_hold_anything_and_have_any_length(impl: Impl, variant: Variant) -> None:
    student, teacher = features(2, 2, 8, 4), features(2, 2, 8, 5)
    mask = torch.arange(8, device=DEVICE) < torch.tensor([[6], [4]], device=DEVICE)

    def solve(length: int) -> tuple[Tensor, Tensor]:
        leaf = student[:, :, :length].clone().requires_grad_()
        loss = contextual_relation_loss(
            leaf,
            teacher[:, :, :length],
            window=2,
            mask=mask[:, :length],
            layer_weight=0.5,
            variant=variant,
            impl=impl,
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    expected, gradient = solve(8)
    assert gradient.isfinite().all()
    assert torch.equal(gradient.transpose(1, 2)[~mask], torch.zeros_like(gradient.transpose(1, 2)[~mask]))
    shorter, shorter_gradient = solve(6)
    torch.testing.assert_close(shorter, expected)
    torch.testing.assert_close(shorter_gradient, gradient[:, :, :6])
    for junk in (float("nan"), 1e30):
        student.transpose(1, 2)[~mask] = junk
        teacher.transpose(1, 2)[~mask] = -junk
        for ours, other in zip(solve(8), (expected, gradient), strict=True):
            torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_official_variant_is_a_divergence_of_softmaxes(impl: Impl) -> None:
    student, teacher = features(2, 3, 6, 4), features(2, 3, 6, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], device=DEVICE).bool()
    loss = contextual_relation_loss(
        student, teacher, window=1, mask=mask, angle_weight=0.0, variant="official", impl=impl
    )
    # The second sequence has one token: a pair with itself that is counted, and nobody to be compared with.
    sides = [F.normalize(side[0, :, :5], dim=-1) for side in (student, teacher)]
    log_p = []
    for side in sides:
        similarities = side @ side.transpose(1, 2)
        others = similarities[:, ~torch.eye(5, dtype=torch.bool)].view(3, 5, 4)
        log_p.append(others.log_softmax(-1))
    expected = F.kl_div(log_p[0], log_p[1], log_target=True, reduction="sum") / (3 * (25 + 1))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
# Windows: inside the sequences, and all pairs.
@pytest.mark.parametrize("window", [2, 8])
def test_gradcheck(window: int, variant: Variant, impl: Impl) -> None:
    student, teacher = features(2, 3, 6, 3, dtype=torch.float64), features(2, 3, 6, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]], device=DEVICE).bool()

    def loss(student: Tensor, mask: Tensor | None = None) -> Tensor:
        return contextual_relation_loss(
            student, teacher, window=window, mask=mask, layer_weight=0.5, variant=variant, impl=impl
        )

    assert gradcheck(loss, (student.requires_grad_(),))
    assert gradcheck(loss, (student, mask))


# Nothing counts: all padding, no tokens, an empty batch, no layers.
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 0), (0, 3, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_counts(impl: Impl, variant: Variant, shape: tuple[int, int, int]) -> None:
    student = features(*shape, 4).requires_grad_()
    mask = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=DEVICE)
    loss = contextual_relation_loss(
        student, features(*shape, 6), mask=mask, layer_weight=1.0, variant=variant, impl=impl
    )
    assert loss == 0.0
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_tokens_have_no_direction(impl: Impl) -> None:
    """Repeated tokens and zero vectors: relations of 0, finite gradients, and the study's value."""
    student, teacher = features(1, 2, 8, 4), features(1, 2, 8, 5)
    student[:, :, 3] = student[:, :, 2]
    student[:, :, 5] = student[:, :, 4] = student[:, :, 7]
    student[:, 1, 6] = 0.0
    leaf = student.clone().requires_grad_()
    loss = contextual_relation_loss(leaf, teacher, window=3, layer_weight=0.5, impl=impl)
    torch.testing.assert_close(loss, study_loss(student, teacher, 3, 0.5))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.abs().max() < 10.0
    reference = contextual_relation_loss(leaf, teacher, window=3, layer_weight=0.5, impl="reference")
    torch.testing.assert_close(gradient, torch.autograd.grad(reference, leaf)[0], rtol=1e-4, atol=1e-6)


# In the tiles of wide windows too, which are in float64 and have larger squares.
@pytest.mark.parametrize(("impl", "tiles"), [*((impl, False) for impl in IMPLS), ("torch", True)])
def test_lengths_too_small_and_too_large(impl: Impl, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shorter than 1e-12 has no relation; what has a square outside float32 is a NaN, not a quiet nonsense."""
    if tiles:
        monkeypatch.setattr("kdkernels.features.contextual.blocks.MIN_ROWS", 1 << 30)
    student, teacher = features(1, 1, 6, 4), features(1, 1, 6, 5)

    def solve(scale: float, scale_t: float) -> tuple[Tensor, Tensor]:
        leaf = (scale * student).requires_grad_()
        loss = contextual_relation_loss(leaf, scale_t * teacher, window=2, impl=impl)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0] * scale

    expected = solve(1.0, 1.0)
    for scale in (1e-10, 1e16):
        for found in (solve(scale, 1.0), solve(1.0, scale)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for scale in (1e-14, 1e-25):
        loss, gradient = solve(scale, 1.0)
        torch.testing.assert_close(loss, solve(0.0, 1.0)[0])
        assert torch.equal(gradient, torch.zeros_like(gradient))
        torch.testing.assert_close(solve(1.0, scale), solve(1.0, 0.0))
    for found in (solve(1e25, 1.0), solve(1.0, 1e25)):
        assert found[0].isnan() or tiles


@pytest.mark.parametrize("impl", IMPLS)
def test_a_student_equal_to_its_teacher_has_no_loss(impl: Impl) -> None:
    teacher = features(2, 3, 9, 4)
    student = teacher.clone().requires_grad_()
    for variant in VARIANTS:
        loss = contextual_relation_loss(
            student, teacher, window=2, layer_weight=1.0, variant=variant, impl=impl
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0.0
        assert gradient.abs().max() < 1e-6
