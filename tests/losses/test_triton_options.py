"""The options of the Triton row kernel: label smoothing, statistics, transforms, vocabulary maps, powers, weights."""

import math

import pytest
import torch
from torch import Tensor

from kdkernels._triton.kd.rows import kd_rows
from kdkernels.divergences import JSD, AlphaBeta, Decoupled, Divergence, ForwardKL, ReverseKL, SkewKL
from kdkernels.options import LogitTransform, RowTerms
from tests.support.row_kernels import (
    DEVICE,
    DIVERGENCES,
    ROWS,
    SMALL,
    check,
    inputs,
    name,
    options_for,
    reference,
)

# One of each kind: two passes, two with an online mean, three with two means, three with powers, two without the label.
KINDS: list[Divergence] = [ForwardKL(), ReverseKL(), SkewKL(0.3), AlphaBeta(0.4, 0.8), Decoupled()]


# At 1 CE shares the sums of the divergence; at 2 it has its own.
@pytest.mark.parametrize(
    ("divergence", "temperature"), [(ForwardKL(), 1.0), *((kind, 2.0) for kind in KINDS)], ids=name
)
def test_label_smoothing(divergence: Divergence, temperature: float):
    student, teacher, labels = inputs(130)
    check(student, teacher, labels, RowTerms(divergence, temperature, ce_weight=0.7, label_smoothing=0.1))


def test_label_smoothing_of_shifted_logits():
    """The mean logit is measured from the label's, so that an offset costs no digits."""
    student, teacher, labels = inputs(130)
    check(student + 3000, teacher, labels, RowTerms(ForwardKL(), ce_weight=1.0, label_smoothing=0.3))


def test_label_smoothing_of_an_excluded_label_is_infinite():
    student, teacher, labels = inputs(130)
    student[torch.arange(ROWS), labels] = float("-inf")
    terms = RowTerms(ForwardKL(), ce_weight=1.0, label_smoothing=0.3)
    assert kd_rows(student, teacher, labels, terms, config=SMALL)[1].eq(math.inf).all()


TRANSFORMS = [
    (LogitTransform(0.5), LogitTransform()),
    (LogitTransform(1.0, 8.0), LogitTransform(2.0)),
    (LogitTransform(2.0, 5.0), LogitTransform(0.25, 30.0)),
]


# Scale on one side; softcap and scale; a softcap near its limits and one that hardly bends.
@pytest.mark.parametrize(
    ("divergence", "transforms"),
    [(ForwardKL(), TRANSFORMS[0]), (ForwardKL(), TRANSFORMS[1]), *((kind, TRANSFORMS[2]) for kind in KINDS)],
    ids=name,
)
def test_transforms(divergence: Divergence, transforms: tuple[LogitTransform, LogitTransform]):
    student, teacher, labels = inputs(130)
    bias = torch.randn(2, 130, device=DEVICE)
    terms = RowTerms(
        divergence, 2.0, ce_weight=0.5, student_transform=transforms[0], teacher_transform=transforms[1]
    )
    check(student, teacher, labels, terms, student_bias=bias[0], teacher_bias=bias[1])


def test_a_softcap_makes_minus_infinity_finite():
    student, teacher, labels = inputs(130)
    student[:, 5], teacher[:, 100] = float("-inf"), float("-inf")
    cap = LogitTransform(1.0, 10.0)
    terms = RowTerms(ForwardKL(), ce_weight=0.5, student_transform=cap, teacher_transform=cap)
    check(student, teacher, labels, terms)


# The student's columns: more than a tile behind the prefix; as many as the prefix, with more of the teacher's.
BEHIND, BEYOND = (210, 70, 70), (128, 210, 128)


@pytest.mark.parametrize(
    ("divergence", "sizes"),
    [*((divergence, BEHIND) for divergence in DIVERGENCES), (ForwardKL(), BEYOND), (JSD(), BEYOND)],
    ids=name,
)
def test_shared_prefix(divergence: Divergence, sizes: tuple[int, int, int]):
    student_size, teacher_size, shared = sizes
    student, _, labels = inputs(student_size)
    _, teacher, _ = inputs(teacher_size)
    student[0, -1], teacher[0, -1] = 40.0, 50.0  # what is not shared may be large
    labels[0], labels[1] = 3, student_size - 1
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5), vocab_map=shared)


def index_map(student_size: int, teacher_size: int) -> Tensor:
    """A random one-to-one map; a third of the student's columns have no partner."""
    places = torch.randperm(teacher_size)[:student_size]
    places = torch.nn.functional.pad(places, (0, student_size - places.numel()), value=-1)
    places[::3] = -1
    return places.to(DEVICE)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_index_map(divergence: Divergence):
    student, _, labels = inputs(130)
    _, teacher, _ = inputs(90)
    places = index_map(130, 90)
    labels[0], labels[1] = 0, 1  # without a partner, and with one
    bias = torch.randn(220, device=DEVICE)
    terms = RowTerms(divergence, 0.5, ce_weight=0.5, teacher_transform=LogitTransform(0.5, 9.0))
    check(student, teacher, labels, terms, vocab_map=places, student_bias=bias[:130], teacher_bias=bias[130:])


def test_divergence_gradient_is_zero_outside_of_the_map():
    student, teacher, labels = inputs(130)
    places = index_map(130, 130)
    for divergence in DIVERGENCES:
        grad = torch.full_like(student, float("nan"))
        options = options_for(divergence)
        kd_rows(
            student,
            teacher,
            labels,
            RowTerms(divergence),
            grad=grad,
            vocab_map=places,
            config=SMALL,
            **options,
        )
        assert torch.equal(grad[:, places < 0], torch.zeros_like(grad[:, places < 0])), name(divergence)
        assert (grad[:, places >= 0] != 0).any()


LIMITS = [(0.7, 0.0), (0.0, 0.7), (0.6, -0.6), (-0.6, 0.6), (0.0, 0.0), (1.5, -0.4), (1.0, 0.0), (0.0, 1.0)]


# Every limit of the alpha-beta family, both signs, and the two that have kernels of their own, far from the teacher; some
# so near that every column takes the series.
@pytest.mark.parametrize(
    ("alpha", "beta", "distance"),
    [*((*powers, 1.0) for powers in LIMITS), (0.7, 0.0, 0.02), (0.0, 0.0, 0.02), (1.5, -0.4, 0.02)],
)
def test_powers(alpha: float, beta: float, distance: float):
    _, teacher, labels = inputs(130)
    student = teacher + distance * torch.randn_like(teacher)
    check(student, teacher, labels, RowTerms(AlphaBeta(alpha, beta), 1.5, ce_weight=0.5))


def test_a_certain_label_leaves_the_rest_alone():
    """Decoupled rows whose teacher, then whose student, gives nothing to the other columns."""
    student, teacher, labels = inputs(130)
    labels[:] = 7
    teacher[0] = float("-inf")
    teacher[0, 7] = 1.0
    student[1, 7] = 60.0  # nearly all
    options = options_for(Decoupled())
    terms = RowTerms(Decoupled(), 2.0, t_squared=False)
    grad = torch.empty_like(student)
    exact_teacher = teacher.double().clamp(min=-1e5)
    exact = reference(student.double(), exact_teacher, labels, terms, None, **options)
    kd, _ = kd_rows(student, teacher, labels, terms, grad=grad, config=SMALL, **options)
    # Row 0: -1e5 everywhere is a uniform rest for the reference, no rest for the kernel: only the label's part is left.
    assert grad[0].isfinite().all() and kd.isfinite().all()
    torch.testing.assert_close(kd[1:].double(), exact[0][1:], rtol=1e-5, atol=1e-6)
    log_s = (student[0] / 2).log_softmax(-1)
    torch.testing.assert_close(kd[0], -0.5 * log_s[7], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[0, 7], 0.5 * 0.5 * (log_s[7].exp() - 1), rtol=1e-5, atol=0)


def test_a_label_out_of_range_is_loud_when_decoupled():
    student, teacher, labels = inputs(130)
    labels[1] = 130
    grad = torch.zeros_like(student)
    options = options_for(Decoupled())
    kd, _ = kd_rows(student, teacher, labels, RowTerms(Decoupled()), grad=grad, config=SMALL, **options)
    assert kd.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().all() and not grad[[0, 2]].isnan().any()
