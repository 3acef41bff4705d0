"""The Triton row kernels, run by Triton's interpreter, against the reference in fp64.

A block of 64 columns stands in for the real ones, so that few columns already make several tiles and a ragged tail.
"""

import pytest
import torch
from torch import Tensor

from kdkernels._triton.configs import CHUNK_BYTES, RowConfig, chunk_rows, launch_options, row_config
from kdkernels._triton.projection import mse_rows
from kdkernels._triton.rows import kd_rows
from kdkernels.divergences import JSD, BuiltDivergence, ForwardKL, ReverseKL
from kdkernels.options import RowTerms
from kdkernels.reference import kd_row_losses
from tests.support.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = RowConfig(block=64, width=8, num_warps=1)
DIVERGENCES = [ForwardKL(), ReverseKL(), JSD(0.3)]
ROWS = 3


def reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Row losses and their weighted gradient by autograd, with everything in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    weight = None if weight is None else weight.to(dtype)
    losses = kd_row_losses(student, teacher.to(dtype), labels, weight, terms)
    (losses if weight is None else losses * weight).sum().backward()
    assert student.grad is not None
    return losses.detach(), student.grad


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,
    config: RowConfig = SMALL,
) -> Tensor:
    """Run the kernel, in place when no `grad` is given, and hold losses and gradient to the budget; the gradient."""
    exact_student = student.double() + (0.0 if student_bias is None else student_bias.double())
    exact_teacher = teacher.double() + (0.0 if teacher_bias is None else teacher_bias.double())
    # -inf has no gradient in eager code (0 * inf); -1e5 has the same probability and has one.
    exact_student, exact_teacher = exact_student.clamp(min=-1e5), exact_teacher.clamp(min=-1e5)
    exact = reference(exact_student, exact_teacher, labels, terms, row_weight, torch.float64)
    eager = reference(exact_student, exact_teacher, labels, terms, row_weight, torch.float32)
    written = student if grad is None else grad
    kd, ce = kd_rows(
        student,
        teacher,
        labels,
        terms,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        row_weight=row_weight,
        grad=written,
        config=config,
    )
    assert kd.dtype == ce.dtype == torch.float32
    assert_within_budget(terms.kd_scale * kd + terms.ce_weight * ce, eager[0], exact[0], "row losses")
    assert_within_budget(written, eager[1].to(written.dtype), exact[1], "gradient")
    return written


def inputs(vocabulary: int, dtype: torch.dtype = torch.float32, teacher_dtype: torch.dtype | None = None):
    """Student, teacher and labels of a few rows; the student stands away from zero."""
    student = (torch.randn(ROWS, vocabulary, device=DEVICE) * 2 + 3).to(dtype)
    teacher = (torch.randn(ROWS, vocabulary, device=DEVICE) * 2).to(teacher_dtype or dtype)
    return student, teacher, torch.randint(0, vocabulary, (ROWS,), device=DEVICE)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
# 1: both softmaxes share their sums; 0.5 and 4: the normaliser of CE is a sum of its own.
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_terms(divergence: BuiltDivergence, ce_weight: float, temperature: float):
    student, teacher, labels = inputs(130)
    terms = RowTerms(divergence, temperature, kd_weight=0.9, ce_weight=ce_weight)
    check(student, teacher, labels if ce_weight else None, terms)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
# 1: a certain row; 2, 37: one masked tile; 64: one full tile and no tail; 65: a tail of one column; 128: full tiles only.
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 64, 65, 128])
def test_ragged_vocabularies(divergence: BuiltDivergence, vocabulary: int):
    student, teacher, labels = inputs(vocabulary)
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5, t_squared=False))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["bf16", "fp16-fp32", "fp32-bf16"],
)
def test_dtypes_into_a_gradient_of_its_own(
    divergence: BuiltDivergence, dtype: torch.dtype, teacher_dtype: torch.dtype
):
    student, teacher, labels = inputs(130, dtype, teacher_dtype)
    kept = student.clone()
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5), grad=torch.empty_like(student))
    assert torch.equal(student, kept)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_gradient_over_fp32_logits(divergence: BuiltDivergence, dtype: torch.dtype):
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


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
def test_biases(divergence: BuiltDivergence, sides: str):
    student, teacher, labels = inputs(130)
    bias = torch.randn(2, 130, device=DEVICE)
    check(
        student,
        teacher,
        labels,
        RowTerms(divergence, 0.5, ce_weight=0.5),
        student_bias=bias[0] if sides != "teacher" else None,
        teacher_bias=bias[1].bfloat16() if sides != "student" else None,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_weights_touch_the_gradient_only_and_dead_rows_are_not_read(divergence: BuiltDivergence):
    student, teacher, labels = inputs(130)
    weight = torch.tensor([0.25, 0.0, -3.0], device=DEVICE)
    terms = RowTerms(divergence, 2.0, ce_weight=0.5)
    exact = reference(student, teacher, labels, terms, None, torch.float64)
    eager = reference(student, teacher, labels, terms, None, torch.float32)
    student[1], teacher[1], labels[1] = float("nan"), float("inf"), -100
    grad = torch.full_like(student, float("nan"))
    kd, ce = kd_rows(student, teacher, labels, terms, row_weight=weight, grad=grad, config=SMALL)
    assert kd[1] == 0.0 and ce[1] == 0.0 and torch.equal(grad[1], torch.zeros_like(grad[1]))
    live = [0, 2]
    assert_within_budget((terms.kd_scale * kd + 0.5 * ce)[live], eager[0][live], exact[0][live], "row losses")
    scaled = weight.unsqueeze(1)
    assert_within_budget(grad[live], (eager[1] * scaled)[live], (exact[1] * scaled)[live], "gradient")


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_values_alone_equal_values_with_a_gradient(divergence: BuiltDivergence):
    student, teacher, labels = inputs(130)
    terms = RowTerms(divergence, 2.0, ce_weight=0.5)
    kept = student.clone()
    kd, ce = kd_rows(student, teacher, labels, terms, config=SMALL)
    assert torch.equal(student, kept)
    kd_again, ce_again = kd_rows(student, teacher, labels, terms, grad=student, config=SMALL)
    assert torch.equal(kd, kd_again) and torch.equal(ce, ce_again)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_logits_of_minus_infinity(divergence: BuiltDivergence):
    """Columns that both sides rule out, over a whole tile, over the first columns and over the tail."""
    student, teacher, labels = inputs(196)
    for ruled_out in (slice(0, 5), slice(64, 128), slice(190, 196)):
        student[:, ruled_out] = teacher[:, ruled_out] = float("-inf")
    labels[:] = 20
    if not isinstance(divergence, ReverseKL):
        teacher[:, 140:150] = float("-inf")  # a teacher that rules out more than the student
    if isinstance(divergence, JSD):
        student[:, 150:160] = float("-inf")
    check(student, teacher, labels, RowTerms(divergence, 2.0, ce_weight=0.5))


@pytest.mark.parametrize(
    ("divergence", "side"), [(ForwardKL(), "student"), (ReverseKL(), "teacher")], ids=repr
)
def test_infinite_divergence_is_infinite(divergence: BuiltDivergence, side: str):
    student, teacher, _ = inputs(130)
    (student if side == "student" else teacher)[:, 70] = float("-inf")
    kd, _ = kd_rows(student, teacher, None, RowTerms(divergence), config=SMALL)
    assert torch.equal(kd, torch.full_like(kd, float("inf")))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_nan_logits_are_not_swallowed(divergence: BuiltDivergence):
    for side in (0, 1):
        pair = inputs(130)[:2]
        pair[side][1, 70] = float("nan")
        grad = torch.zeros_like(pair[0])
        kd, _ = kd_rows(*pair, None, RowTerms(divergence), grad=grad, config=SMALL)
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


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_offsets_cost_no_digits(divergence: BuiltDivergence):
    student, teacher, labels = inputs(130)
    # Multiples of 2**-14 stay exact under the offsets, so the rows are the same functions of their columns.
    student, teacher = (student * 2**14).round() / 2**14, (teacher * 2**14).round() / 2**14
    terms = RowTerms(divergence, 2.0, ce_weight=0.5)
    kd, ce = kd_rows(student, teacher, labels, terms, config=SMALL)
    moved_kd, moved_ce = kd_rows(student + 100, teacher - 60, labels, terms, config=SMALL)
    assert torch.equal(kd, moved_kd) and torch.equal(ce, moved_ce)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_small_divergences_keep_their_digits(divergence: BuiltDivergence):
    """Rows that differ by 1e-3 have a divergence near 5e-7, of which eager fp32 loses most digits."""
    _, teacher, _ = inputs(130)
    student = teacher + 1e-3 * torch.randn_like(teacher) + 0.1
    terms = RowTerms(divergence)
    exact, _ = reference(student, teacher, None, terms, None, torch.float64)
    kd, _ = kd_rows(student, teacher, None, terms, config=SMALL)
    assert 1e-8 < exact.max() < 1e-5
    # JSD measures from a mixture, which is rounded once: an error of a part of the rounding step, not of the value.
    bound = 5e-8 if isinstance(divergence, JSD) else 5e-5 * exact
    assert ((kd.double() - exact).abs() < bound).all()


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
    scale = torch.tensor(0.125, device=DEVICE)
    exact = prediction.double() + bias.double() - target.double()
    eager = prediction.float() + bias - target.float()
    prediction[1] = float("nan")
    squares = mse_rows(prediction, target, bias=bias, row_weight=weight, scale=scale, config=SMALL)
    live, factor = [0, 2], (2 * 0.125 * weight).unsqueeze(1)
    assert squares[1] == 0.0 and torch.equal(prediction[1], torch.zeros_like(prediction[1]))
    assert_within_budget(squares[live], eager.square().sum(1)[live], exact.square().sum(1)[live], "squares")
    assert_within_budget(
        prediction[live], (eager * factor)[live].to(dtype), (exact * factor)[live], "gradient"
    )


def test_squared_differences_without_options():
    prediction, target = torch.randn(2, ROWS, 130, device=DEVICE)
    difference = prediction - target
    kept = prediction.clone()
    squares = mse_rows(prediction, target, write_grad=False, config=SMALL)
    assert torch.equal(prediction, kept)
    assert_within_budget(squares, difference.square().sum(1), difference.double().square().sum(1), "squares")
    mse_rows(prediction, target, scale=0.5, config=SMALL)
    torch.testing.assert_close(prediction, difference, rtol=0, atol=0)


def test_chunk_rows():
    device = torch.device(DEVICE)
    assert chunk_rows(8192, 32000, None, device) == 4096  # 2**30 / 256000 rows, down to a step of 256
    assert chunk_rows(8192, 256000, None, device) == 1024  # the floor
    assert chunk_rows(100, 256000, None, device) == 100
    assert chunk_rows(10**9, 1, None, device) == CHUNK_BYTES // 8
    assert chunk_rows(8192, 32000, 8 * 32000 * 700, device) == 512
    assert chunk_rows(8192, 32000, 8 * 32000 * 3, device) == 3
    assert chunk_rows(8192, 32000, 1, device) == 1


def test_only_ragged_rows_on_nvidia_are_given_registers():
    assert "maxnreg" not in launch_options(row_config("sm_90"), 32000, 32000)
    assert launch_options(row_config("sm_90"), 50257, 50272)["maxnreg"] == 128
    assert "maxnreg" not in launch_options(row_config("gfx942"), 50257, 50257)
