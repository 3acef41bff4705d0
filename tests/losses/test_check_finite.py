"""`check_finite=True`: a loss that is NaN or infinite says which row and which side did it."""

import math
from typing import Any

import pytest
import torch

from kdkernels import Decoupled, KDLoss, TeacherTopK, kd_loss, linear_kd_loss, teacher_cross_term
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, IMPLS, make_case

NO_SOFTMAX = (
    ": its logits hold a NaN or a +inf, or nothing but -inf; earlier rows are fine. Look for overflow in the layers "
    "before, or for a learning rate that is too high"
)


def sentence(call) -> str:
    with pytest.raises(FloatingPointError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
# A NaN, an overflow, and a row that excludes everything.
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_bad_row_and_its_side(value, reduction, impl: Impl) -> None:
    student, teacher = torch.randn(2, 2, 5, 9, device=DEVICE)
    options = {"check_finite": True, "reduction": reduction, "impl": impl}
    kd_loss(student, teacher, **options)
    bad = student.clone()
    bad[1, 2], bad[1, 4] = value, value
    assert sentence(lambda: kd_loss(bad, teacher, **options)) == (
        f"row 7 has no finite softmax for the student{NO_SOFTMAX}"
    )
    bad = teacher.clone()
    bad[0, 3] = value
    assert sentence(lambda: kd_loss(student, bad, **options)) == (
        f"row 3 has no finite softmax for the teacher{NO_SOFTMAX}"
    )
    assert sentence(lambda: kd_loss(bad, bad, **options)) == (
        f"row 3 has no finite softmax for the student and the teacher{NO_SOFTMAX}"
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_do_not_count_are_not_looked_at(impl: Impl) -> None:
    case = make_case()
    case.student_hidden[case.labels == -100] = math.nan
    options = {"check_finite": True, "impl": impl, "student_bias": case.student_bias}
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    assert linear_kd_loss(*arguments, **options).isfinite()
    case.student_hidden[6, 0] = math.nan
    text = sentence(lambda: linear_kd_loss(*arguments, **options))
    assert text == f"row 6 has no finite softmax for the student{NO_SOFTMAX}"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_divergence_that_is_infinite(impl: Impl) -> None:
    student, teacher = torch.randn(2, 4, 9, device=DEVICE)
    teacher[2, 3] = -math.inf
    text = sentence(lambda: kd_loss(student, teacher, divergence="reverse_kl", check_finite=True, impl=impl))
    assert text == (
        "the loss is inf although all valid rows have finite logits or -inf: ReverseKL() is infinite where one side "
        "has probability 0 and the other has not; use jsd or a skew, or keep -inf out of the logits"
    )
    assert kd_loss(student, teacher, divergence="skew_reverse_kl", check_finite=True, impl=impl).isfinite()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_other_forms_of_a_teacher(impl: Impl) -> None:
    case = make_case()
    top_k = TeacherTopK(*case.teacher_logits.log_softmax(-1).topk(4))
    top_k.logprobs[5] = math.nan
    cross_term = teacher_cross_term(case.teacher, case.student_weight)
    cross_term.entropy[5] = math.nan
    for teacher in (top_k, cross_term):
        text = sentence(
            lambda teacher=teacher: linear_kd_loss(
                case.student_hidden, case.student_weight, teacher, case.labels, check_finite=True, impl=impl
            )
        )
        assert text == f"row 5 has no finite softmax for the teacher{NO_SOFTMAX}"


def test_without_it_the_loss_is_returned_as_it_is() -> None:
    student, teacher = torch.randn(2, 4, 9, device=DEVICE)
    student[1, 1] = math.nan
    assert kd_loss(student, teacher).isnan()
    with pytest.raises(FloatingPointError):
        KDLoss(check_finite=True)(student, teacher)
    weight = torch.ones(4, device=DEVICE)
    weight[2] = math.nan
    text = sentence(lambda: kd_loss(teacher, teacher, token_weight=weight, check_finite=True))
    assert text == "token_weight holds a NaN in a valid row"


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_that_are_not_finite_are_named(impl: Impl) -> None:
    student, teacher = torch.randn(2, 4, 9, device=DEVICE)
    labels = torch.tensor([1, -100, 2, 3], device=DEVICE)
    for row, number, what in ((2, math.inf, "an infinity"), (3, math.nan, "a NaN")):
        weight = torch.ones(4, device=DEVICE)
        weight[row] = number
        for name, given in (
            ("token_weight", {"token_weight": weight}),
            ("Decoupled.target", {"divergence": Decoupled(target=weight)}),
            ("Decoupled.non_target", {"divergence": Decoupled(non_target=weight)}),
        ):
            options: dict[str, Any] = {**given, "impl": impl, "check_finite": True}
            text = sentence(lambda options=options: kd_loss(student, teacher, labels, **options))
            assert text == f"{name} holds {what} in a valid row"
