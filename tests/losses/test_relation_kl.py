"""`relation_kl` against the eager lines of its docstring, in fp64 and at the inputs' dtype."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import relation_kl
from kdkernels.options import Impl, Reduction
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS
from tests.support.rounding import truths


@dataclass(frozen=True)
class Features:
    """Queries and, for attention maps, keys of both sides."""

    student_q: Tensor  # (B, N, D_s)
    teacher_q: Tensor  # (B, N, D_t)
    student_k: Tensor | None
    teacher_k: Tensor | None
    mask: Tensor | None  # (B, N)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.student_q, self.teacher_q, self.student_k, self.teacher_k

    def leaves(self) -> list[Tensor]:
        """The student's tensors, requiring grad."""
        given = [side for side in (self.student_q, self.student_k) if side is not None]
        return [side.requires_grad_() for side in given]

    def to(self, dtype: torch.dtype) -> "Features":
        return self.map(lambda side: side.detach().to(dtype))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """Every tensor of features changed."""
        student_k, teacher_k = (None if side is None else change(side) for side in self.arguments[2:])
        return Features(change(self.student_q), change(self.teacher_q), student_k, teacher_k, self.mask)


def make_features(
    *,
    keys: bool = False,
    masked: bool = True,
    dtype: torch.dtype = torch.float32,
    length: int = 37,  # one tile of the interpreter and a ragged second
    widths: tuple[int, int] = (24, 40),
) -> Features:
    """Three sequences: a full one, one with holes and padding, one that is all padding."""

    def normal(width: int) -> Tensor:
        return (1.5 * torch.randn(3, length, width)).to(DEVICE, dtype)

    mask = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    mask[1, 3:4] = mask[1, length // 2 :] = mask[2] = False
    student_q, teacher_q = normal(widths[0]), normal(widths[1])
    student_k, teacher_k = (normal(widths[0]), normal(widths[1])) if keys else (None, None)
    return Features(student_q, teacher_q, student_k, teacher_k, mask if masked else None)


def eager(features: Features, heads: tuple[int, int], causal: bool) -> tuple[Tensor, ...]:
    """Sums over heads of each token, by the docstring's lines in float64 and sequence by sequence, and their gradients."""
    moved = features.to(torch.float64)
    leaves = moved.leaves()
    mask = torch.ones_like(moved.student_q[..., 0], dtype=torch.bool) if moved.mask is None else moved.mask

    def log_relations(q: Tensor, k: Tensor | None, count: int) -> Tensor:
        q, k = (side.unflatten(1, (count, -1)).transpose(0, 1) for side in (q, q if k is None else k))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
        return F.log_softmax(scores, -1).repeat_interleave(max(heads) // count, 0)

    rows = torch.zeros(mask.shape, dtype=torch.float64, device=DEVICE)
    for sequence, counted in enumerate(mask):
        q_s, q_t, k_s, k_t = (None if side is None else side[sequence][counted] for side in moved.arguments)
        assert q_s is not None and q_t is not None
        student, teacher = log_relations(q_s, k_s, heads[0]), log_relations(q_t, k_t, heads[1])
        terms = teacher.exp() * (teacher - student).masked_fill(teacher == -math.inf, 0.0)
        rows = rows.index_put((torch.tensor(sequence), counted.nonzero().squeeze(1)), terms.sum((0, 2)))
    return rows.detach(), *torch.autograd.grad(rows.sum() / (mask.sum() * max(heads)), leaves)


def solve(features: Features, impl: Impl, **options: Any) -> tuple[Tensor, ...]:
    """The same by `relation_kl`."""
    leaves = features.leaves()
    rows = relation_kl(*features.arguments, mask=features.mask, impl=impl, reduction="none", **options)
    heads = options["heads"]
    count = (rows.numel() if features.mask is None else features.mask.sum()) * (
        max(heads) if isinstance(heads, tuple) else heads
    )
    return rows.detach(), *torch.autograd.grad(rows.sum() / count, leaves)


@pytest.mark.parametrize("impl", IMPLS)
# Relations of one kind to itself, whose gradient has two parts; queries and keys. The dtypes each once with both.
@pytest.mark.parametrize(
    ("keys", "causal", "dtype"),
    [
        (False, False, torch.float32),
        (False, True, torch.float32),
        (True, False, torch.float32),
        (True, True, torch.float32),
        (False, False, torch.bfloat16),
        (True, True, torch.bfloat16),
        (False, True, torch.float16),
        (True, False, torch.float16),
    ],
)
def test_equals_the_eager_lines(keys: bool, causal: bool, dtype: torch.dtype, impl: Impl) -> None:
    features = make_features(keys=keys, dtype=dtype)
    truth = truths(lambda: eager(features, (2, 2), causal))
    actual = solve(features, impl, heads=2, causal=causal)
    assert actual[0].dtype == torch.float32
    assert_within_budget(actual[0], truth[0], "rows")
    for index, gradient in enumerate(actual[1:], 1):
        assert gradient.dtype == dtype
        assert_within_budget(gradient, truth[index], f"gradient {index}")


@pytest.mark.parametrize("impl", IMPLS)
# Fewer heads on either side; one head on both, padded to a wider tile; heads that fill their tile.
@pytest.mark.parametrize(
    ("heads", "widths", "keys"),
    [((2, 4), (24, 40), False), ((6, 2), (24, 40), True), (1, (20, 33), True), (2, (32, 64), False)],
)
def test_heads(heads: int | tuple[int, int], widths: tuple[int, int], keys: bool, impl: Impl) -> None:
    counts = heads if isinstance(heads, tuple) else (heads, heads)
    features = make_features(keys=keys, widths=widths)
    truth = truths(lambda: eager(features, counts, False))
    for index, actual in enumerate(solve(features, impl, heads=heads)):
        assert_within_budget(actual, truth[index], f"result {index}")


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("length", [1, 32, 70])
def test_lengths(length: int, impl: Impl) -> None:
    features = make_features(length=length, masked=False, dtype=torch.float64)
    expected = solve(features, "reference", heads=2, causal=True)
    actual = solve(features.to(torch.float32), impl, heads=2, causal=True)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_in_several_chunks(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch back end cuts maps that are large, and takes small ones together."""
    from kdkernels._torch import relations

    features = make_features(keys=True, dtype=torch.float64)
    expected = solve(features, "reference", heads=4, causal=causal)
    for elements in (7 * 37, 3 * 37 * 37, 1):
        monkeypatch.setattr(relations, "CHUNK_ELEMENTS", elements)
        for ours, truth in zip(solve(features, "torch", heads=4, causal=causal), expected, strict=True):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keys", [False, True])
def test_tokens_that_do_not_count_may_hold_anything(keys: bool, impl: Impl) -> None:
    features = make_features(keys=keys, length=9)
    expected = solve(features, impl, heads=2)
    assert features.mask is not None
    for junk in (float("nan"), 1e30):
        for side in features.arguments:
            if side is not None:
                side.detach()[~features.mask] = junk
        for ours, other in zip(solve(features, impl, heads=2), expected, strict=True):
            torch.testing.assert_close(ours, other)
            if ours.dim():
                assert torch.equal(ours[~features.mask], torch.zeros_like(ours[~features.mask]))


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(impl: Impl) -> None:
    features = make_features(length=9)
    assert features.mask is not None
    options: dict[str, Any] = {"heads": 2, "impl": impl, "mask": features.mask}
    rows = relation_kl(*features.arguments, reduction="none", **options)
    assert rows.shape == features.mask.shape and torch.equal(rows == 0, ~features.mask)
    total = relation_kl(*features.arguments, reduction="sum", **options)
    torch.testing.assert_close(total, rows.sum())
    mean = relation_kl(*features.arguments, **options)
    torch.testing.assert_close(mean, rows.sum() / (2 * features.mask.sum()))


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_upstream_gradient_and_a_second_backward(reduction: str, impl: Impl) -> None:
    features = make_features(keys=True, length=9)
    leaves = features.leaves()
    options: dict[str, Any] = {"heads": 2, "mask": features.mask, "reduction": reduction}
    loss = relation_kl(*features.arguments, impl=impl, **options)
    reference = relation_kl(*features.arguments, impl="reference", **options)
    upstream = torch.rand_like(loss)
    expected = torch.autograd.grad(reference, leaves, upstream)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, 2.0 * upstream, retain_graph=True)
    for one, two, truth in zip(first, again, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(two, 2.0 * truth, rtol=1e-4, atol=1e-6)
    (only_keys,) = torch.autograd.grad(loss, leaves[1:], upstream, retain_graph=True)
    torch.testing.assert_close(only_keys, expected[1], rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("keys", [False, True])
def test_gradcheck(keys: bool, impl: Impl) -> None:
    features = make_features(keys=keys, dtype=torch.float64, length=6, widths=(4, 8))

    def loss(q: Tensor, k: Tensor | None = None) -> Tensor:
        return relation_kl(
            q, features.teacher_q, k, features.teacher_k, heads=(2, 4), mask=features.mask, causal=True, impl=impl
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, tuple(features.leaves()))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_counts(impl: Impl) -> None:
    features = make_features(length=9)
    nothing = torch.zeros(3, 9, dtype=torch.bool, device=DEVICE)
    for student, teacher, mask in (
        (features.student_q, features.teacher_q, nothing),
        (features.student_q[:0], features.teacher_q[:0], None),
        (features.student_q[:, :0], features.teacher_q[:, :0], None),
    ):
        leaf = student.detach().requires_grad_()
        choices: list[tuple[Reduction, bool]] = [
            ("mean", False), ("sum", True), ("none", False), ("mean", True),
        ]  # fmt: skip
        for reduction, causal in choices:
            loss = relation_kl(
                leaf, teacher, heads=2, mask=mask, causal=causal, reduction=reduction, impl=impl
            )
            assert torch.equal(loss, torch.zeros_like(loss))
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_teacher_itself_and_large_scores(impl: Impl) -> None:
    features = make_features(keys=True)
    teacher = (features.teacher_q, features.teacher_q, features.teacher_k, features.teacher_k)
    assert relation_kl(*teacher, heads=2, mask=features.mask, impl=impl).abs() < 1e-6
    # Scores of some hundreds, whose exponentials no float32 holds.
    large = features.map(lambda side: 12.0 * side)
    truth = truths(lambda: eager(large, (2, 2), False))
    for index, actual in enumerate(solve(large, impl, heads=2)):
        assert_within_budget(actual, truth[index], f"result {index}")


def test_the_kernel_keeps_the_digits_of_a_small_divergence() -> None:
    """Of a student 1e-3 from its teacher the divergence is 1e-5; a difference of log-sums is wrong by 1e-7."""
    features = make_features(keys=True, length=100, widths=(24, 24), masked=False)
    keys = features.teacher_k
    assert keys is not None
    near = replace(
        features,
        student_q=features.teacher_q + 1e-3 * features.student_q,
        student_k=keys + 1e-3 * torch.randn_like(keys),
    )
    for causal in (False, True):
        truth = truths(lambda causal=causal: eager(near, (2, 2), causal))
        rows, *gradients = solve(near, "triton", heads=2, causal=causal)
        # Logits of size 10 that differ by 1e-3 keep three digits of their difference, and the value twice its error.
        torch.testing.assert_close(rows.double(), truth[0].value, rtol=2e-3, atol=1e-9)
        for gradient, exact in zip(gradients, truth[1:], strict=True):
            assert_within_budget(gradient, exact, "gradient")


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_features(impl: Impl) -> None:
    features = make_features(masked=False)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = solve(features, impl, heads=2)
    rounded = features.to(torch.bfloat16).to(torch.float32)
    for ours, expected in zip(actual, solve(rounded, "reference", heads=2), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_views_with_strides(impl: Impl) -> None:
    """Queries and keys cut out of one projection, as models have them."""
    features = make_features(masked=False)
    student, teacher = torch.randn(2, 3, 37, 3 * 24, device=DEVICE).unbind()
    q, k, _ = student.requires_grad_().split(24, -1)
    teacher_q, teacher_k = teacher[..., 5:29], teacher.transpose(0, 1)[..., :24].transpose(0, 1)
    del features
    results = [
        torch.autograd.grad(relation_kl(q, teacher_q, k, teacher_k, heads=2, impl=name), student, retain_graph=True)
        for name in (impl, "reference")
    ]  # fmt: skip
    torch.testing.assert_close(*results[0], *results[1], rtol=1e-4, atol=1e-6)


def test_bad_input() -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=DEVICE)

    good: dict[str, Any] = {"student_q": zeros(2, 5, 8), "teacher_q": zeros(2, 5, 12), "heads": 2}
    refusals: list[tuple[dict[str, Any], str]] = [
        (
            {"student_q": zeros(3, 5, 8)},
            "student_q and teacher_q must have the same batch and length, got shapes (3, 5, 8) and (2, 5, 12)",
        ),
        (
            {"student_q": zeros(2, 4, 8)},
            "student_q and teacher_q must have the same batch and length, got shapes (2, 4, 8) and (2, 5, 12)",
        ),
        (
            {"student_q": zeros(5, 8)},
            "student_q and teacher_q must have shapes (B, N, D_s) and (B, N, D_t), got (5, 8) and (2, 5, 12)",
        ),
        ({"heads": 3}, "heads must divide the width, but 3 does not divide the student's 8"),
        ({"heads": 8}, "heads must divide the width, but 8 does not divide the teacher's 12"),
        (
            {"heads": 0},
            "heads must be a whole number above 0, or a pair of them for student and teacher, got 0",
        ),
        (
            {"heads": (2, 2.0)},
            "heads must be a whole number above 0, or a pair of them for student and teacher, got (2, 2.0)",
        ),
        (
            {"heads": (2, 3)},
            "of the two numbers of heads one must divide the other, got 2 for the student and 3 for the teacher; "
            "relation heads need not be the attention heads: choose one number for both",
        ),
        (
            {"student_k": zeros(2, 5, 8)},
            "student_k is given but teacher_k is not; pass both for query-key relations, neither for relations of one kind",
        ),
        (
            {"teacher_k": zeros(2, 5, 12)},
            "teacher_k is given but student_k is not; pass both for query-key relations, neither for relations of one kind",
        ),
        (
            {"student_k": zeros(2, 5, 4), "teacher_k": zeros(2, 5, 12)},
            "student_q and student_k must have one shape and dtype, got (2, 5, 8) torch.float32 and (2, 5, 4) "
            "torch.float32; repeat the keys of grouped-query attention once per query head",
        ),
        (
            {"mask": zeros(2, 5)},
            "mask must be a bool tensor, True where a position counts, got torch.float32; use mask.bool()",
        ),
        (
            {"mask": zeros(2, 4).bool()},
            "mask must have shape (2, 5), one entry for each position of student (2, 5, 8), got (2, 4)",
        ),
        (
            {"student_k": zeros(2, 5, 8), "teacher_k": zeros(2, 5, 12).requires_grad_()},
            "teacher_k requires grad, but the teacher is frozen here and would get no gradient; "
            "run the teacher under torch.no_grad(), or pass the tensor's .detach()",
        ),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ]
    for changes, sentence in refusals:
        with pytest.raises(ValueError) as caught:
            relation_kl(**{**good, **changes})
        assert str(caught.value) == sentence
    for dtype, kind, widest in ((torch.float32, "float32", 128), (torch.bfloat16, "half-precision", 256)):
        features = zeros(1, 2, 300).to(dtype)
        with pytest.raises(ValueError) as caught:
            relation_kl(features, features, heads=1, impl="triton")
        assert str(caught.value) == (
            f"impl='triton' takes {kind} relation heads of at most {widest} columns, got 300 for the student; "
            "use more heads or impl='torch'"
        )


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_the_students_dtype_says_how_many_digits(dtypes: tuple[torch.dtype, torch.dtype], impl: Impl) -> None:
    student, teacher = (
        torch.randn(2, 5, 8, device=DEVICE, dtype=dtypes[0]),
        torch.randn(2, 5, 8, device=DEVICE),
    )
    teacher = teacher.to(dtypes[1])
    value = relation_kl(student, teacher, heads=2, impl=impl)
    expected = relation_kl(student.double(), teacher.double(), heads=2, impl="reference")
    assert value.dtype == dtypes[0]
    tolerance = 1e-12 if value.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0.0)
