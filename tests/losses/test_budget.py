"""The bounds of the numeric tests: right results keep away from them, and results with a known defect break them widely."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import ForwardKL, linear_kd_loss
from tests.support.budget import assert_within_budget, error_over_bound
from tests.support.inputs import DEVICE, Case, eager_linear_kd, loss_and_gradients, make_case, true_linear_kd
from tests.support.rounding import Truth, truths

OPTIONS = {"divergence": ForwardKL(), "temperature": 2.0, "ce_weight": 0.5}


def results(case: Case, **changes: object) -> tuple[Tensor, ...]:
    """Mean, and the gradients of hidden states, weight and bias."""
    return loss_and_gradients(case, case.labels, "torch", **{**OPTIONS, **changes})


def rounded_logits(case: Case) -> tuple[Tensor, ...]:
    """The student's logits pass through bfloat16."""
    hidden, weight, bias = case.leaves()
    logits = F.linear(hidden, weight, bias).bfloat16().float()
    head = torch.eye(logits.shape[1], device=DEVICE)
    loss = linear_kd_loss(logits, head, case.teacher, case.labels, impl="torch", **OPTIONS)
    return loss, *torch.autograd.grad(loss, (hidden, weight, bias))


def tf32(tensor: Tensor) -> Tensor:
    """With 10 bits of its digits."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_products(case: Case) -> tuple[Tensor, ...]:
    return results(
        replace(case, student_hidden=tf32(case.student_hidden), student_weight=tf32(case.student_weight))
    )


def one_row_of_half_weight(case: Case) -> tuple[Tensor, ...]:
    weight = torch.ones(len(case.labels), device=DEVICE)
    weight[1] = 0.5
    return results(case, token_weight=weight)


def mean_over_all_rows(case: Case) -> tuple[Tensor, ...]:
    return tuple(part / len(case.labels) for part in results(case, reduction="sum"))


def without_t_squared(case: Case) -> tuple[Tensor, ...]:
    return results(case, t_squared=False)


def summed_in_bfloat16(case: Case) -> tuple[Tensor, ...]:
    """Gradients of the head added up row by row in bfloat16."""
    count = int((case.labels != -100).sum())
    total = [torch.zeros((), dtype=torch.bfloat16, device=DEVICE)] * 2
    whole = results(case)
    for row in range(len(case.labels)):
        if case.labels[row] == -100:
            continue
        here = slice(row, row + 1)
        one = replace(
            case, student_hidden=case.student_hidden[here], teacher_hidden=case.teacher_hidden[here], labels=case.labels[here]
        )  # fmt: skip
        total = [sum_ + (part / count).bfloat16() for sum_, part in zip(total, results(one)[2:], strict=True)]
    return *whole[:2], *(part.to(whole[2].dtype) for part in total)


@pytest.mark.parametrize(
    "defect",
    [
        rounded_logits,
        tf32_products,
        one_row_of_half_weight,
        mean_over_all_rows,
        without_t_squared,
        summed_in_bfloat16,
    ],
)
def test_a_defect_breaks_its_bound_widely(defect: Callable[[Case], tuple[Tensor, ...]]) -> None:
    case = make_case(rows=24)
    truth = true_linear_kd(case, case.labels, **OPTIONS)[1:]
    for right, exact in zip(results(case), truth, strict=True):
        assert_within_budget(right, exact, "without the defect")
    worst = [
        max(error_over_bound(part, exact).values()) for part, exact in zip(defect(case), truth, strict=True)
    ]
    assert max(worst) > 100.0, worst


@pytest.mark.parametrize("defect", [summed_in_bfloat16, one_row_of_half_weight])
def test_half_precision_excuses_two_roundings_only(defect: Callable[[Case], tuple[Tensor, ...]]) -> None:
    """Gradients in bfloat16 are rounded to bfloat16; nothing before them is, and they are not added up there."""
    case = make_case(rows=384, dtype=torch.bfloat16)
    truth = true_linear_kd(case, case.labels, **OPTIONS)[1:]
    for right, exact in zip(results(case), truth, strict=True):
        assert_within_budget(right, exact, "without the defect")
    worst = [error_over_bound(part, exact)["rms"] for part, exact in zip(defect(case), truth, strict=True)]
    assert max(worst) > 2.0, worst


def test_logits_in_bfloat16_are_found_in_the_values() -> None:
    """Of bfloat16 inputs too: between them and the values everything is float32."""
    case = make_case(rows=24, dtype=torch.bfloat16)
    truth = true_linear_kd(case, case.labels, **OPTIONS)[0]
    arguments = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    options = {**OPTIONS, "student_bias": case.student_bias, "reduction": "none", "impl": "torch"}
    assert_within_budget(linear_kd_loss(*arguments, **options), truth, "rows")
    rounded = linear_kd_loss(*arguments, logit_dtype=torch.bfloat16, **options)
    assert min(error_over_bound(rounded, truth).values()) > 100.0


def test_one_wrong_entry_is_found() -> None:
    case = make_case(rows=24)
    truth = true_linear_kd(case, case.labels, **OPTIONS)[3]
    gradient = results(case)[2].clone()
    gradient.view(-1)[gradient.abs().argmax()] *= 1.0 + 1e-4
    assert error_over_bound(gradient, truth)["largest"] > 10.0
    gradient.view(-1)[7] = float("nan")
    with pytest.raises(AssertionError, match="gradient: the rms error is nan times"):
        assert_within_budget(gradient, truth, "gradient")


def test_the_spread_is_the_error_of_float32() -> None:
    """Of eager float32 over many draws of its inputs: within a factor of 2, neither more nor less."""
    errors, spreads = [], []
    for seed in range(24):
        torch.manual_seed(seed)
        case = make_case()
        truth = true_linear_kd(case, case.labels, **OPTIONS)
        low = eager_linear_kd(case, case.labels, **OPTIONS)
        errors.append(
            [(part.double() - exact.value).square().mean() for part, exact in zip(low, truth, strict=True)]
        )
        spreads.append([exact.spread.square().mean() for exact in truth])
    found, expected = (torch.tensor(side, dtype=torch.float64).mean(0).sqrt() for side in (errors, spreads))
    assert (found < 2.0 * expected).all() and (found > 0.25 * expected).all(), found / expected


def test_what_is_exact_has_no_spread() -> None:
    """Differences of neighbours, powers of two and selections round nothing; a sum of n numbers rounds n times."""
    values = torch.randn(64, dtype=torch.float64, device=DEVICE)
    one = torch.ones(4096, dtype=torch.float64, device=DEVICE)
    exact, total = truths(lambda: (2.0 * values[values > 0].abs() / 4.0, one.sum()))
    assert torch.equal(exact.spread, torch.zeros_like(exact.spread))
    # Partial sums of 1 to n, each rounded by up to half a step.
    size = (4096 / 3) ** 0.5 * 4096 * 2.0**-24 / 3**0.5
    assert 0.3 * size < total.spread < 2.0 * size


def test_an_operation_that_the_model_does_not_know_is_refused() -> None:
    values = torch.randn(8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"aten.digamma.default is in no list"):
        truths(lambda: (torch.digamma(values),))
    assert isinstance(truths(lambda: (values.exp(),))[0], Truth)
