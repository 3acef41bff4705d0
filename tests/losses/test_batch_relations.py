"""The relations inside a batch against spellings of their own: loops over samples, pairs and triples in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import (
    attention_transfer_loss,
    fsp_loss,
    linear_cka_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from tests.support.inputs import DEVICE

SAMPLES = range(5)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def length(a: Tensor) -> float:
    return math.sqrt(dot(a, a))


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def similarity(s: Tensor, t: Tensor) -> float:
    def rows(f: Tensor) -> list[list[float]]:
        gram = [[dot(a, b) for b in f] for a in f]
        return [[value / math.hypot(*row) for value in row] for row in gram]

    pairs = [(a, b) for x, y in zip(rows(s), rows(t), strict=True) for a, b in zip(x, y, strict=True)]
    return sum((a - b) ** 2 for a, b in pairs) / len(s) ** 2


def rkd_distance(s: Tensor, t: Tensor) -> float:
    def relative(f: Tensor) -> list[float]:
        distances = [length(a - b) for a in f for b in f]
        positive = [distance for distance in distances if distance > 0]
        return [distance / (sum(positive) / len(positive)) for distance in distances]

    return sum(map(huber, relative(s), relative(t))) / len(s) ** 2


def rkd_angle(s: Tensor, t: Tensor) -> float:
    def angle(f: Tensor, i: int, j: int, k: int) -> float:
        a, b = f[i] - f[j], f[i] - f[k]
        return 0.0 if i in (j, k) else dot(a, b) / (length(a) * length(b))

    n = range(len(s))
    return sum(huber(angle(s, i, j, k), angle(t, i, j, k)) for i in n for j in n for k in n) / len(s) ** 3


def pkt(s: Tensor, t: Tensor, kernel: str = "cosine", divergence: str = "kl") -> float:
    def probabilities(f: Tensor) -> list[float]:
        found = []
        for a in f:
            if kernel == "cosine":
                row = [(dot(a, b) / (length(a) * length(b)) + 1) / 2 for b in f]
            else:
                row = [1 / (1 + length(a - b)) for b in f]
            found += [value / sum(row) for value in row]
        return found

    total = 0.0
    for p_s, p_t in zip(probabilities(s), probabilities(t), strict=True):
        total += (p_t if divergence == "kl" else p_t - p_s) * math.log(p_t / p_s)
    return total / len(s) ** 2


def cka(s: Tensor, t: Tensor) -> float:
    s, t = s - s.mean(0), t - t.mean(0)
    cross = torch.linalg.matrix_norm(t.T @ s) ** 2
    return float(1 - cross / (torch.linalg.matrix_norm(s.T @ s) * torch.linalg.matrix_norm(t.T @ t)))


def attention(s: Tensor, t: Tensor) -> float:
    """One sample: (N, D)."""

    def activity(f: Tensor) -> Tensor:
        means = torch.tensor([dot(row, row) / len(row) for row in f], dtype=f.dtype)
        return means / length(means)

    return float((activity(s) - activity(t)).square().mean())


def fsp(s: Tensor, s_next: Tensor, t: Tensor, t_next: Tensor) -> float:
    """One sample: (N, D)."""
    flows = [
        torch.stack([torch.outer(a, b) for a, b in zip(x, y, strict=True)]).mean(0)
        for x, y in ((s, s_next), (t, t_next))
    ]
    return float((flows[0] - flows[1]).square().mean())


BATCH_LOSSES: list[tuple[Callable[..., Tensor], Callable[..., float], dict[str, Any]]] = [
    (similarity_preserving_loss, similarity, {}),
    (rkd_distance_loss, rkd_distance, {}),
    (rkd_angle_loss, rkd_angle, {}),
    (pkt_loss, pkt, {}),
    (pkt_loss, pkt, {"kernel": "student_t"}),
    (pkt_loss, pkt, {"kernel": "student_t", "divergence": "jeffreys"}),
    (linear_cka_loss, cka, {}),
]
NAMES = [" ".join([loss.__name__, *options.values()]) for loss, _, options in BATCH_LOSSES]
every_batch_loss = pytest.mark.parametrize(("loss", "spelled", "options"), BATCH_LOSSES, ids=NAMES)


@every_batch_loss
def test_equals_the_spelling(loss, spelled, options) -> None:
    student = torch.randn(5, 2, 2, dtype=torch.float64, device=DEVICE)
    teacher = torch.randn(5, 7, dtype=torch.float64, device=DEVICE)
    expected = spelled(student.flatten(1), teacher, **options)
    assert loss(student, teacher, **options).item() == pytest.approx(expected, rel=1e-10)
    # What the teacher itself would be given.
    assert loss(teacher, teacher, **options).item() == pytest.approx(0.0, abs=1e-14)
    rounded = loss(student.bfloat16(), teacher.bfloat16(), **options)
    assert rounded.dtype == torch.float32
    exact = loss(student.bfloat16().double(), teacher.bfloat16().double(), **options)
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert loss(student.float(), teacher.float(), **options).item() == pytest.approx(expected, rel=1e-4)


@every_batch_loss
def test_samples_that_do_not_count(loss, spelled, options) -> None:
    student = torch.randn(7, 4, dtype=torch.float64, device=DEVICE)
    teacher = torch.randn(7, 6, dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([True, False, True, True, False, True, True], device=DEVICE)
    expected = spelled(student[mask], teacher[mask], **options)
    for junk in (float("nan"), 1e30):
        student[~mask] = teacher[~mask] = junk
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, mask=mask, **options)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert gradient[mask].isfinite().all() and gradient[mask].abs().max() > 0
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    nothing = loss(leaf, teacher, mask=torch.zeros_like(mask), **options)
    assert nothing == 0.0
    assert torch.equal(torch.autograd.grad(nothing, leaf)[0], torch.zeros_like(leaf))


@every_batch_loss
def test_gradcheck(loss, spelled, options) -> None:
    student = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher, mask=mask, **options), student)


@every_batch_loss
def test_equal_and_lone_samples_have_finite_gradients(loss, spelled, options) -> None:
    for student in (torch.ones(3, 4), torch.zeros(3, 4), torch.randn(1, 4)):
        student = student.to(DEVICE).requires_grad_()
        value = loss(student, torch.randn(student.shape[0], 4, device=DEVICE), **options)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all()


@every_batch_loss
def test_an_empty_batch_is_a_zero_with_a_graph(loss, spelled, options) -> None:
    student = torch.zeros(0, 3, 2, device=DEVICE, requires_grad=True)
    value = loss(student, torch.zeros(0, 4, device=DEVICE), **options)
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None and student.grad.shape == student.shape


# Samples and their value of which a mean in float32 is not the value again.
@pytest.mark.parametrize(("samples", "value"), [(7, 0.1), (13, 0.7), (11, 123.456)])
def test_equal_samples_have_no_alignment(samples: int, value: float) -> None:
    student = torch.full((samples, 4), value, device=DEVICE, requires_grad=True)
    loss = linear_cka_loss(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 1.0
    assert student.grad is not None and not student.grad.any()


SCALE_FREE = [
    pytest.param(loss, id=name)
    for (loss, _, options), name in zip(BATCH_LOSSES, NAMES, strict=True)
    if not options
]


# Squares, and their squares in Gram matrices and maps, leave float32 on either end.
@pytest.mark.parametrize("loss", [*SCALE_FREE, attention_transfer_loss])
@pytest.mark.parametrize("exponent", [-38, -23, 30, 60, 120])
def test_the_size_of_features_is_no_matter(loss, exponent: int) -> None:
    student, teacher = torch.randn(5, 4, 3, device=DEVICE), torch.randn(5, 4, 2, device=DEVICE)
    scale = 2.0**exponent  # exact
    leaf = student.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(expected := loss(leaf, teacher), leaf)
    torch.testing.assert_close(loss(student, teacher * scale), expected)
    leaf = (student * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(value := loss(leaf, teacher), leaf)
    torch.testing.assert_close(value, expected)
    if exponent < 100:  # else the gradient leaves float32
        torch.testing.assert_close(gradient.double() * scale, expected_gradient.double())


@pytest.mark.parametrize("loss", [*SCALE_FREE, attention_transfer_loss])
@pytest.mark.parametrize("scale", [1e-14, 1e-40])
def test_features_that_are_next_to_nothing_count_as_zeros(loss, scale: float) -> None:
    student, teacher = torch.randn(5, 4, 3, device=DEVICE), torch.randn(5, 4, 2, device=DEVICE)
    leaf = (student * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(value := loss(leaf, teacher), leaf)
    torch.testing.assert_close(value, loss(0.0 * student, teacher))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_each_sample_and_map_has_a_size_of_its_own() -> None:
    """Where a sample is normalised by itself, a far larger one beside it changes nothing."""
    sizes = torch.tensor([1.0, 2.0**-30, 2.0**60], device=DEVICE)
    student, teacher = torch.randn(3, 4, 5, device=DEVICE), torch.randn(3, 4, 5, device=DEVICE)
    expected = attention_transfer_loss(student, teacher)
    torch.testing.assert_close(attention_transfer_loss(student * sizes.view(3, 1, 1), teacher), expected)
    student, teacher = student[:, 0], teacher[:, 0]
    torch.testing.assert_close(pkt_loss(student * sizes.view(3, 1), teacher), pkt_loss(student, teacher))


@every_batch_loss
def test_half_precision_is_computed_in_float32(loss, spelled, options) -> None:
    """The square of 300 leaves float16."""
    student, teacher = 300 * torch.randn(2, 4, 3, device=DEVICE)
    student, teacher = student.half(), teacher.half()
    torch.testing.assert_close(
        loss(student, teacher, **options), loss(student.float(), teacher.float(), **options)
    )


def test_attention_transfer_and_fsp() -> None:
    student, student_next = torch.randn(2, 2, 6, 3, dtype=torch.float64, device=DEVICE)
    teacher, teacher_next = torch.randn(2, 2, 6, 3, dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]], device=DEVICE)
    counted = [mask[sample] for sample in range(2)]
    attentions = [attention(student[b][counted[b]], teacher[b][counted[b]]) for b in range(2)]
    flows = [
        fsp(*(side[b][counted[b]] for side in (student, student_next, teacher, teacher_next)))
        for b in range(2)
    ]
    for junk in (0.0, float("nan"), 1e30):
        for side in (student, student_next, teacher, teacher_next):
            side[~mask] = junk
        leaves = [side.clone().requires_grad_() for side in (student, student_next)]
        value = attention_transfer_loss(leaves[0], teacher, mask=mask)
        assert value.item() == pytest.approx((6 * attentions[0] + 3 * attentions[1]) / 9, rel=1e-10)
        flow = fsp_loss(leaves[0], leaves[1], teacher, teacher_next, mask=mask)
        assert flow.item() == pytest.approx(sum(flows) / 2, rel=1e-10)
        for gradient in torch.autograd.grad(value + flow, leaves):
            assert gradient.isfinite().all()
            assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    nothing = mask & ~mask
    for value in (
        attention_transfer_loss(leaves[0], teacher, mask=nothing),
        fsp_loss(leaves[0], leaves[1], teacher, teacher_next, mask=nothing),
    ):
        assert value == 0.0
        assert torch.equal(torch.autograd.grad(value, leaves[0])[0], torch.zeros_like(student))
    # One sample that is all padding is not averaged in.
    alone = fsp_loss(
        leaves[0],
        leaves[1],
        teacher,
        teacher_next,
        mask=mask & torch.tensor([[True], [False]], device=DEVICE),
    )
    assert alone.item() == pytest.approx(flows[0], rel=1e-10)


def test_gradcheck_of_sequences() -> None:
    student, student_next = (
        torch.randn(2, 4, width, dtype=torch.float64, device=DEVICE, requires_grad=True) for width in (3, 2)
    )
    teacher, teacher_next = (torch.randn(2, 4, width, dtype=torch.float64, device=DEVICE) for width in (3, 2))
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]], device=DEVICE)
    assert torch.autograd.gradcheck(lambda s: attention_transfer_loss(s, teacher_next, mask=mask), student)
    assert torch.autograd.gradcheck(
        lambda s, n: fsp_loss(s, n, teacher, teacher_next, mask=mask), (student, student_next)
    )


def test_against_the_library() -> None:
    """The eager lines of the docstrings, at float32."""
    student, teacher = torch.randn(6, 8, device=DEVICE), torch.randn(6, 5, device=DEVICE)

    def unit(f: Tensor) -> Tensor:
        return F.normalize(f.unsqueeze(0) - f.unsqueeze(1), dim=2)

    angles = [torch.bmm(unit(f), unit(f).transpose(1, 2)) for f in (student, teacher)]
    torch.testing.assert_close(rkd_angle_loss(student, teacher), F.smooth_l1_loss(angles[0], angles[1]))
    kernels = [(F.cosine_similarity(f[:, None], f[None], dim=2) + 1) / 2 for f in (student, teacher)]
    p_s, p_t = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
    torch.testing.assert_close(pkt_loss(student, teacher), (p_t * (p_t / p_s).log()).mean())


def test_bad_input() -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=DEVICE)

    batch: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((zeros(3), zeros(3, 2)), {}, "student and teacher must have shape (B, ...), got (3,) and (3, 2)"),
        (
            (zeros(3, 2), zeros(4, 2)),
            {},
            "student and teacher must hold the same samples, got batches of 3 and 4",
        ),
        (([1.0], zeros(4, 2)), {}, "student must be a tensor, got list"),
        (
            (zeros(3, 2), zeros(3, 2)),
            {"mask": zeros(3)},
            "mask must be a bool tensor, True where a sample counts, got torch.float32; use mask.bool()",
        ),
        (
            (zeros(3, 2), zeros(3, 2)),
            {"mask": zeros(2).bool()},
            "mask must have shape (3,), one entry for each sample of student (3, 2), got (2,)",
        ),
        (
            (zeros(3, 2), zeros(3, 2).requires_grad_()),
            {},
            "teacher requires grad, but the teacher is frozen here and would get no gradient; "
            "run the teacher under torch.no_grad(), or pass the tensor's .detach()",
        ),
    ]
    for arguments, options, sentence in batch:
        for loss, _, _ in BATCH_LOSSES:
            with pytest.raises(ValueError) as caught:
                loss(*arguments, **options)
            assert str(caught.value) == sentence
    sequences: list[tuple[Callable[[], Tensor], str]] = [
        (
            lambda: fsp_loss(zeros(2, 3, 4), zeros(2, 5, 4), zeros(2, 3, 4), zeros(2, 5, 4)),
            "student and student_next must have the same batch and length, got shapes (2, 3, 4) and (2, 5, 4)",
        ),
        (
            lambda: pkt_loss(zeros(3, 2), zeros(3, 2), kernel="rbf"),  # pyright: ignore[reportArgumentType]
            "kernel must be one of 'cosine', 'student_t', got 'rbf'",
        ),
        (
            lambda: pkt_loss(zeros(3, 2), zeros(3, 2), divergence="js"),  # pyright: ignore[reportArgumentType]
            "divergence must be one of 'kl', 'jeffreys', got 'js'",
        ),
        (
            lambda: attention_transfer_loss(zeros(2, 3, 4), zeros(2, 4, 4)),
            "student and teacher must have the same batch and length, got shapes (2, 3, 4) and (2, 4, 4)",
        ),
        (
            lambda: attention_transfer_loss(zeros(2, 3), zeros(2, 3)),
            "student and teacher must have shapes (B, N, D_s) and (B, N, D_t), got (2, 3) and (2, 3)",
        ),
        (
            lambda: attention_transfer_loss(zeros(2, 3, 4), zeros(2, 3, 4), mask=zeros(2, 3)),
            "mask must be a bool tensor, True where a position counts, got torch.float32; use mask.bool()",
        ),
        (
            lambda: fsp_loss(zeros(2, 3, 4), zeros(2, 3, 5), zeros(2, 3, 4), zeros(2, 3, 6)),
            "student_next and teacher_next have widths 5 and 6; map one onto the other's width first",
        ),
    ]
    for call, sentence in sequences:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
