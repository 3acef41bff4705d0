"""The Triton row kernels, run by Triton's interpreter, against the reference in fp64.

A block of 64 columns stands in for the real ones, so that few columns already make several tiles and a ragged tail.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from kdkernels._triton.kd.rows import kd_rows
from kdkernels._triton.launch import CHUNK_BYTES, chunk_budget, chunk_rows, launch_options, row_config
from kdkernels._triton.projection import mse_rows
from kdkernels.divergences import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    Divergence,
    ForwardKL,
    Renyi,
    ReverseKL,
)
from kdkernels.options import RowTerms
from tests.support.budget import assert_within_budget
from tests.support.rounding import truths
from tests.support.row_kernels import (
    DEVICE,
    DIVERGENCES,
    ROWS,
    SMALL,
    check,
    inputs,
    name,
    options_for,
    true_rows,
)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
# At 1 both softmaxes share their sums; at 0.5 and 4 the normaliser of CE is a sum of its own.
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.7), (0.5, 0.0), (4.0, 0.7)])
def test_terms(divergence: Divergence, temperature: float, ce_weight: float):
    student, teacher, labels = inputs(130)
    terms = RowTerms(divergence, temperature, kd_weight=0.9, ce_weight=ce_weight)
    with_labels = ce_weight != 0.0 or isinstance(divergence, Decoupled)
    check(student, teacher, labels if with_labels else None, terms)


# 1: a certain row; 37: one masked tile; 64: full tiles only; 65: a tail of one column.
@pytest.mark.parametrize(
    ("divergence", "vocabulary"),
    [*product(DIVERGENCES, (1, 65)), *product((ForwardKL(), JSD(), AlphaBeta(0.3, 0.6)), (37, 64))],
    ids=name,
)
def test_ragged_vocabularies(divergence: Divergence, vocabulary: int):
    student, teacher, labels = inputs(vocabulary)
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5, t_squared=False))


# Both sides half, for each divergence; a half against fp32, either way.
@pytest.mark.parametrize(
    ("divergence", "dtype", "teacher_dtype"),
    [
        *((divergence, torch.bfloat16, torch.bfloat16) for divergence in DIVERGENCES),
        (ForwardKL(), torch.float16, torch.float32),
        (JSD(), torch.float32, torch.bfloat16),
    ],
    ids=name,
)
def test_dtypes_into_a_gradient_of_its_own(
    divergence: Divergence, dtype: torch.dtype, teacher_dtype: torch.dtype
):
    student, teacher, labels = inputs(130, dtype, teacher_dtype)
    kept = student.clone()
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5), grad=torch.empty_like(student))
    assert torch.equal(student, kept)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_gradient_over_fp32_logits(divergence: Divergence, dtype: torch.dtype):
    """The gradient lies in the first half of the bytes of each row; what lies outside of the row stays as it was."""
    vocabulary, width = 202, 208
    buffer = torch.full((ROWS, width), float("nan"), device=DEVICE)
    student, teacher, labels = inputs(vocabulary)
    buffer[:, :vocabulary] = student
    weight = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    check(
        buffer[:, :vocabulary],
        teacher,
        labels,
        RowTerms(divergence, 2.0, ce_weight=0.5),
        row_weight=weight,
        grad=buffer.view(dtype)[:, :vocabulary],
    )
    assert buffer[:, vocabulary:].isnan().all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
def test_biases(divergence: Divergence, sides: str):
    student, teacher, labels = inputs(130)
    bias = torch.randn(2, 130, device=DEVICE)
    # At 0.5 one quotient of exp(20) is all of chi-squared, and the rounding of one number a matter of luck.
    temperature = 2.0 if isinstance(divergence, ChiSquared) else 0.5
    check(
        student,
        teacher,
        labels,
        RowTerms(divergence, temperature, ce_weight=0.5),
        student_bias=bias[0] if sides != "teacher" else None,
        teacher_bias=bias[1].bfloat16() if sides != "student" else None,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_weights_touch_the_gradient_only_and_dead_rows_are_not_read(divergence: Divergence):
    student, teacher, labels = inputs(130)
    weight = torch.tensor([0.25, 0.0, -3.0], device=DEVICE)
    terms = RowTerms(divergence, 2.0, ce_weight=0.5)
    options = options_for(divergence)
    exact = true_rows(student.clone(), teacher.clone(), labels.clone(), terms, weight, **options)
    student[1], teacher[1], labels[1] = float("nan"), float("inf"), -100
    grad = torch.full_like(student, float("nan"))
    kd, ce = kd_rows(student, teacher, labels, terms, row_weight=weight, grad=grad, config=SMALL, **options)
    assert kd[1] == 0.0 and ce[1] == 0.0 and torch.equal(grad[1], torch.zeros_like(grad[1]))
    live = [0, 2]
    assert_within_budget((terms.kd_scale * kd + 0.5 * ce)[live], exact[0][live], "row losses")
    assert_within_budget(grad[live], exact[1][live], "gradient")


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_values_alone_equal_values_with_a_gradient(divergence: Divergence):
    student, teacher, labels = inputs(130)
    terms = RowTerms(divergence, 2.0, ce_weight=0.5)
    options = options_for(divergence)
    kept = student.clone()
    kd, ce = kd_rows(student, teacher, labels, terms, config=SMALL, **options)
    assert torch.equal(student, kept)
    kd_again, ce_again = kd_rows(student, teacher, labels, terms, grad=student, config=SMALL, **options)
    assert torch.equal(kd, kd_again) and torch.equal(ce, ce_again)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_logits_of_minus_infinity(divergence: Divergence):
    """Columns that both sides rule out, over a whole tile, over the first columns and over the tail."""
    student, teacher, labels = inputs(196)
    for ruled_out in (slice(0, 5), slice(64, 128), slice(190, 196)):
        student[:, ruled_out] = teacher[:, ruled_out] = float("-inf")
    labels[:] = 20
    if not isinstance(divergence, ReverseKL):
        teacher[:, 140:150] = float("-inf")  # a teacher that rules out more than the student
    if not isinstance(divergence, ForwardKL | ReverseKL | Decoupled | ChiSquared) and divergence != Renyi(
        2.0
    ):
        student[:, 150:160] = float("-inf")
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5))


@pytest.mark.parametrize(
    ("divergence", "side"),
    [
        (ForwardKL(), "student"),
        (ReverseKL(), "teacher"),
        (AlphaBeta(0.7, 0.0), "student"),
        (AlphaBeta(0.0, 0.7), "teacher"),
        (AlphaBeta(1.5, -0.4), "student"),
        (AlphaBeta(0.6, -0.6), "teacher"),
        (AlphaBeta(-0.6, 0.6), "student"),
        (AlphaBeta(0.0, 0.0), "student"),
        (ChiSquared(), "student"),
        (Renyi(1.5), "student"),
        (Decoupled(), "student"),
    ],
    ids=name,
)
def test_infinite_divergence_is_infinite(divergence: Divergence, side: str):
    student, teacher, labels = inputs(130)
    labels[:] = 3
    (student if side == "student" else teacher)[:, 70] = float("-inf")
    options = options_for(divergence)
    kd, _ = kd_rows(student, teacher, labels, RowTerms(divergence), config=SMALL, **options)
    assert torch.equal(kd, torch.full_like(kd, float("inf")))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_nan_logits_are_not_swallowed(divergence: Divergence):
    for side in (0, 1):
        student, teacher, labels = inputs(130)
        (student, teacher)[side][1, 70] = float("nan")
        grad = torch.zeros_like(student)
        terms, options = RowTerms(divergence), options_for(divergence)
        kd, _ = kd_rows(student, teacher, labels, terms, grad=grad, config=SMALL, **options)
        assert kd.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("label", [-100, -1, 130, 2**32 + 5])
def test_a_label_out_of_range_reads_nothing_and_is_loud(label: int):
    student, teacher, labels = inputs(130)
    labels[1] = label
    grad = torch.zeros_like(student)
    _, ce = kd_rows(
        student, teacher, labels, RowTerms(ForwardKL(), 2.0, ce_weight=0.5), grad=grad, config=SMALL
    )
    assert ce.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().all() and not grad[[0, 2]].isnan().any()


def test_labels_without_a_weight_are_not_read():
    student, teacher, labels = inputs(130)
    student[:, 3] = float("-inf")
    labels[:] = 3
    labels[0] = 10**6
    kd, ce = kd_rows(student, teacher, labels, RowTerms(JSD(), 2.0), grad=student, config=SMALL)
    assert kd.isfinite().all() and torch.equal(ce, torch.zeros_like(ce)) and student.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_offsets_cost_no_digits(divergence: Divergence):
    student, teacher, labels = inputs(130)
    # Multiples of 2**-14 stay exact under the offsets, so the rows are the same functions of their columns.
    student, teacher = (student * 2**14).round() / 2**14, (teacher * 2**14).round() / 2**14
    terms = RowTerms(divergence, 2.0, ce_weight=0.5)
    options = options_for(divergence)
    kd, ce = kd_rows(student, teacher, labels, terms, config=SMALL, **options)
    moved_kd, moved_ce = kd_rows(student + 100, teacher - 60, labels, terms, config=SMALL, **options)
    assert torch.equal(kd, moved_kd) and torch.equal(ce, moved_ce)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_small_divergences_keep_their_digits(divergence: Divergence):
    """Rows that differ by 1e-3 have a divergence near 5e-7, of which eager fp32 loses most digits."""
    _, teacher, labels = inputs(130)
    student = teacher + 1e-3 * torch.randn_like(teacher) + 0.1
    terms, options = RowTerms(divergence), options_for(divergence)
    truth, true_grad = true_rows(student, teacher, labels, terms, None, **options)
    exact = truth.value
    grad = torch.empty_like(student)
    kd, _ = kd_rows(student, teacher, labels, terms, grad=grad, config=SMALL, **options)
    assert 1e-8 < exact.max() < (1e-3 if isinstance(divergence, TVD) else 1e-5)
    # JSD measures from a mixture, which is rounded once: an error of a part of the rounding step, not of the value.
    bound = 5e-8 if isinstance(divergence, JSD) else 2e-4 * exact
    assert ((kd.double() - exact).abs() < bound).all()
    assert_within_budget(grad, true_grad, "gradient")


def test_the_table_covers_real_rows():
    """The configuration that ships, over a vocabulary of more than one of its tiles."""
    student, teacher, labels = inputs(row_config("sm_90").block + 1)
    check(student, teacher, labels, RowTerms(JSD(), 2.0, ce_weight=0.5), config=row_config("sm_90"))


def test_no_rows():
    empty = torch.empty(0, 130, device=DEVICE)
    kd, ce = kd_rows(empty, empty, None, RowTerms(), grad=empty)
    assert kd.shape == ce.shape == (0,) and kd.dtype == torch.float32
    assert mse_rows(empty, empty).shape == (0,)


def test_refusals():
    student, teacher, _ = inputs(16)
    with pytest.raises(
        ValueError, match="computes in float32, got teacher_logits in float64; use impl='torch' there"
    ):
        kd_rows(student, teacher.double(), None, RowTerms())
    with pytest.raises(
        ValueError, match="computes in float32, got target in float64; use impl='torch' there"
    ):
        mse_rows(student, teacher.double())
    half_rows = student.view(torch.bfloat16).as_strided((ROWS, 16), (16, 1))
    with pytest.raises(
        ValueError, match="rows must start where theirs do; got row strides of 32 and 64 bytes"
    ):
        kd_rows(student, teacher, None, RowTerms(), grad=half_rows)


# 1, 37: one masked tile; 64: one full tile; 130: full tiles and a tail.
@pytest.mark.parametrize("width", [1, 37, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_squared_differences(width: int, dtype: torch.dtype):
    prediction, target = torch.randn(2, ROWS, width, device=DEVICE).to(dtype)
    bias = torch.randn(width, device=DEVICE)
    weight = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    wide = prediction.double(), bias.double(), target.double()
    live, factor = [0, 2], (2 * weight).unsqueeze(1).double()

    def eager() -> tuple[Tensor, Tensor]:
        difference = wide[0] + wide[1] - wide[2]
        return difference.square().sum(1), difference * factor

    true_squares, true_gradient = truths(eager)
    prediction[1] = float("nan")
    squares = mse_rows(prediction, target, bias=bias, row_weight=weight, config=SMALL)
    assert squares[1] == 0.0 and torch.equal(prediction[1], torch.zeros_like(prediction[1]))
    assert_within_budget(squares[live], true_squares[live], "squares")
    assert_within_budget(prediction[live], true_gradient[live], "gradient")


def test_squared_differences_without_options():
    prediction, target = torch.randn(2, ROWS, 130, device=DEVICE)
    difference = prediction - target
    kept = prediction.clone()
    squares = mse_rows(prediction, target, write_grad=False, config=SMALL)
    assert torch.equal(prediction, kept)
    wide = kept.double(), target.double()
    (truth,) = truths(lambda: ((wide[0] - wide[1]).square().sum(1),))
    assert_within_budget(squares, truth, "squares")
    mse_rows(prediction, target, config=SMALL)
    torch.testing.assert_close(prediction, 2.0 * difference, rtol=0, atol=0)


def test_chunk_rows():
    device = torch.device(DEVICE)
    assert chunk_rows(10**9, 128256, None, device) == 4096  # 2**32 bytes, down to a step of 256
    assert chunk_rows(10**9, 2**21, None, device) == 1024  # the floor
    assert chunk_rows(100, 256000, None, device) == 100
    assert chunk_rows(10**9, 1, None, device) <= CHUNK_BYTES[0] // 8
    assert chunk_rows(8192, 32000, 8 * 32000 * 700, device) == 512
    assert chunk_rows(8192, 32000, 8 * 32000 * 3, device) == 3
    assert chunk_rows(8192, 32000, 1, device) == 1


def test_chunks_are_equal():
    """Eight rows more than two chunks are no third one that reads both heads again."""
    device = torch.device(DEVICE)
    for rows in (8200, 5000, 4097, 12_289):
        size = chunk_rows(rows, 128256, None, device)
        chunks = -(-rows // size)
        assert chunks == -(-rows // 4096) and size <= 4096
        assert rows - (chunks - 1) * size > size - 256 * chunks  # the last lacks what rounding up took


def test_the_budget_follows_the_memory():
    gigabyte = 2**30
    assert chunk_budget(None) == 4 * gigabyte
    assert chunk_budget((100 * gigabyte, 140 * gigabyte)) == 4 * gigabyte
    assert chunk_budget((7 * gigabyte, 140 * gigabyte)) == 2 * gigabyte
    assert chunk_budget((20 * gigabyte, 24 * gigabyte)) == gigabyte
    assert chunk_budget((gigabyte, 140 * gigabyte)) == gigabyte
    # A few steps, not a number of its own for every state of the allocator: gradients are to be the same bits.
    sizes = {chunk_budget((free * gigabyte, 140 * gigabyte)) for free in range(1, 140)}
    assert len(sizes) == 3


def test_only_ragged_rows_and_rich_code_on_nvidia_are_given_registers():
    nvidia, amd = row_config("sm_90"), row_config("gfx942")
    assert "maxnreg" not in launch_options(nvidia, 32000, 32000)
    assert launch_options(nvidia, 50257, 50272)["maxnreg"] == 128
    assert launch_options(nvidia, 32000, 32000, fits_default_registers=False)["maxnreg"] == 128
    assert launch_options(nvidia, 50257, 50257)["maxnreg"] == 128
    assert launch_options(nvidia, 50257, 50257, fits_default_registers=False)["maxnreg"] == 192
    assert "maxnreg" not in launch_options(amd, 50257, 50257, fits_default_registers=False)
