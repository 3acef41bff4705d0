"""What holds for every shape, dtype, temperature and for logits that no model should give, over drawn examples.

Examples are drawn from a fixed seed, so a run is like the run before.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdkernels import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherTopK,
    kd_loss,
)
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, FAST_IMPLS

EVERY = [
    ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.05), SkewKL(0.1), SkewReverseKL(0.1), TVD(), AlphaBeta(0.2, 0.7),
    AlphaBeta(0.5, 0.0), AlphaBeta(0.0, 0.5), ChiSquared(), Renyi(0.5), Renyi(2.0), Decoupled(1.0, 4.0),
]  # fmt: skip
# Finite whatever the teacher excludes.
FORGIVING = [ForwardKL(), JSD(0.5), SkewKL(0.1), SkewReverseKL(0.1), TVD(), Renyi(0.5), AlphaBeta(0.2, 0.7)]
COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=False,
)

temperatures = st.floats(math.log(0.1), math.log(100.0)).map(math.exp)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
# Around a tile, a block and a vector of the kernels, and the smallest.
vocabularies = st.sampled_from([1, 2, 3, 7, 16, 63, 64, 65, 517, 2049])


def examples(impl: Impl) -> settings:
    """Fewer in Triton's interpreter, which takes a hundred times as long."""
    return settings(COMMON, max_examples=5 if impl == "triton" and DEVICE == "cpu" else 60)


def solve(
    impl: Impl, student: Tensor, teacher: Any, labels: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    rows = kd_loss(student, teacher, labels, reduction="none", impl=impl, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient


def wide(teacher: Any, dtype: torch.dtype) -> Any:
    if isinstance(teacher, TeacherTopK):
        return TeacherTopK(teacher.logprobs.to(dtype), teacher.indices, teacher.tail)
    return teacher.to(dtype)


def size(divergence: Any) -> float:
    """Of the terms that cancel in a divergence: alpha-beta divides what is left of numbers near 1."""
    if isinstance(divergence, Decoupled):
        return float(divergence.target + divergence.non_target)
    if not isinstance(divergence, AlphaBeta):
        return 1.0
    return 1.0 / ((divergence.alpha or divergence.beta) * (divergence.beta or divergence.alpha))


def apart(student: Tensor, teacher: Any) -> float:
    """How far the logits of the two sides may be apart."""
    numbers = teacher.logprobs if isinstance(teacher, TeacherTopK) else teacher
    sides = [side[side.isfinite()].abs().double() for side in (student, numbers)]
    return sum(float(side.max()) for side in sides if side.numel())


def assert_right(impl: Impl, student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> None:
    """Rows and gradient are as near to fp64 as four times the float32 specification, and finite where it is.

    Four and not two: which of two roundings is the luckier one varies, and here are hundreds of small examples.
    """
    rows, gradient = solve(impl, student, teacher, labels, **options)
    if isinstance(options["divergence"], TVD):
        # Where the two nearly agree the sign of their difference, and so the gradient, is a matter of rounding.
        gradient = gradient[:0]
    exact = solve("reference", student.double(), wide(teacher, torch.float64), labels, **options)
    low = solve("reference", student.to(rows.dtype), wide(teacher, rows.dtype), labels, **options)
    factor = options["temperature"] + options.get("ce_weight", 0.0)
    for name, ours, plain, truth, scale in (
        ("rows", rows, low[0], exact[0], factor * options["temperature"]),
        ("gradient", gradient, low[1][: len(gradient)], exact[1][: len(gradient)], factor),
    ):
        assert torch.equal(ours.isfinite(), truth.isfinite()), f"{name}: {ours} instead of {truth}"
        finite = truth.isfinite()
        step = torch.finfo(ours.dtype).eps
        error = (ours.double() - truth)[finite].abs()
        # Rows are taken as they are while logits / T are below 30 in size, where half a step of float32 is 1e-6; a difference
        # of the two sides is rounded by half of its own step, and its product with a probability by as much again. And
        # float16 gradients below its smallest normal number are rounded to a multiple of 6e-8.
        distance = apart(student, teacher) / options["temperature"]
        rounding = max(2e-6, 2.0**-23 * distance if distance < 60.0 else 0.0)
        floor = rounding * scale * size(options["divergence"]) + (
            6e-8 if ours.dtype == torch.float16 else 0.0
        )
        bound = 4.0 * (plain.double() - truth)[finite].abs().max().item() if bool(finite.any()) else 0.0
        assert (error <= bound + 2.0 * step * truth[finite].abs() + floor).all(), f"{name}: {error.max():.3e}"


def make(
    seed: int, rows: int, vocabulary: int, dtype: torch.dtype, spread: float, shift: float, near: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels; `near` 0 makes them independent, 1 the same."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, vocabulary, generator=generator) * spread
    student = (
        near * teacher + (1.0 - near) * spread * torch.randn(rows, vocabulary, generator=generator) + shift
    )
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return student.to(DEVICE, dtype), (teacher - shift / 2).to(DEVICE, dtype), labels.to(DEVICE)


drawn = st.builds(
    make,
    st.integers(0, 2**31),
    st.integers(1, 5),
    vocabularies,
    dtypes,
    st.sampled_from([1e-3, 1.0, 4.0, 50.0]),
    st.sampled_from([0.0, 100.0, -1e4, 1e4]),
    st.sampled_from([0.0, 0.9, 0.999, 1.0]),
)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_any_logits(impl: Impl) -> None:
    @examples(impl)
    @given(
        drawn, st.sampled_from(EVERY), temperatures, st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.2])
    )
    def check(tensors, divergence, temperature, ce_weight, label_smoothing) -> None:
        student, teacher, labels = tensors
        if impl == "triton" and student.dtype == torch.float64:
            student, teacher = student.float(), teacher.float()
        assert_right(
            impl, student, teacher, labels, divergence=divergence, temperature=temperature, ce_weight=ce_weight,
            label_smoothing=label_smoothing,
        )  # fmt: skip

    check()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_excluded_entries_and_certain_teachers(impl: Impl) -> None:
    @examples(impl)
    @given(
        drawn,
        st.sampled_from(FORGIVING),
        temperatures,
        st.sampled_from(["both", "teacher", "certain"]),
        st.integers(1, 4),
    )
    def check(tensors, divergence, temperature, kind, every) -> None:
        student, teacher, labels = (tensor.clone() for tensor in tensors)
        student, teacher = student.float(), teacher.float()
        if kind == "certain":
            teacher.fill_(-math.inf)
            teacher.scatter_(1, labels.unsqueeze(1), 3.0)
        else:
            excluded = torch.arange(student.shape[1], device=DEVICE) % (every + 1) == every
            teacher[:, excluded] = -math.inf
            if kind == "both":
                student[:, excluded] = -math.inf
        assert_right(impl, student, teacher, None, divergence=divergence, temperature=temperature)

    check()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_any_top_k(impl: Impl) -> None:
    @examples(impl)
    @given(
        drawn,
        st.sampled_from(FORGIVING[:-1]),
        temperatures,
        st.sampled_from(["renormalize", "bucket"]),
        st.integers(1, 9),
    )
    def check(tensors, divergence, temperature, tail, kept) -> None:
        student, logits, labels = tensors
        student, logits = student.float(), logits.float()
        logprobs, indices = logits.log_softmax(-1).topk(min(kept, logits.shape[1]))
        teacher = TeacherTopK(logprobs, indices, tail)
        assert_right(
            impl, student, teacher, labels, divergence=divergence, temperature=temperature, ce_weight=0.3
        )

    check()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_rows_are_alone(impl: Impl) -> None:
    """A row's result does not depend on the rows beside it, on whether they count, or on what they hold."""

    @examples(impl)
    @given(
        drawn,
        st.sampled_from([case for case in EVERY if not isinstance(case, TVD)]),
        temperatures,
        st.integers(0, 4),
    )
    def check(tensors, divergence, temperature, place) -> None:
        student, teacher, labels = (tensor.clone() for tensor in tensors)
        student, teacher = student.float(), teacher.float()
        options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.5}
        rows, gradient = solve(impl, student, teacher, labels, **options)
        dead = place % len(student)
        student[dead], teacher[dead], labels[dead] = math.nan, math.inf, -100
        again, other = solve(impl, student, teacher, labels, **options)
        alive = torch.arange(len(student), device=DEVICE) != dead
        assert again[dead] == 0.0 and torch.equal(other[dead], torch.zeros_like(other[dead]))
        torch.testing.assert_close(again[alive], rows[alive], rtol=1e-4, atol=1e-5 * temperature**2)
        torch.testing.assert_close(other[alive], gradient[alive], rtol=1e-4, atol=1e-5 * temperature)

    check()


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_two_hundred_thousand_entries(divergence) -> None:
    student, teacher, labels = make(1, 2, 200_000, torch.float32, 3.0, 0.0, 0.5)
    assert_right("torch", student, teacher, labels, divergence=divergence, temperature=1.5, ce_weight=0.5)
