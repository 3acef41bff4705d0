"""Calls that torch would answer with a sentence about its own inside: each gets one about the call, or works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels import (
    Decoupled,
    KDLoss,
    LinearKDLoss,
    TeacherHead,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
    projection_mse,
    teacher_cross_term,
)
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, FAST_IMPLS, IMPLS, make_case
from tests.support.refusals import linear, mse, plain, refused, zeros


def test_unknown_keywords() -> None:
    for call, name in (
        (plain, "kd_loss"),
        (linear, "linear_kd_loss"),
        (KDLoss, "KDLoss"),
        (LinearKDLoss, "LinearKDLoss"),
    ):
        refused(call, f"{name} has no keyword 'temp'; did you mean 'temperature'?", TypeError, temp=2.0)
        refused(call, f"{name} has no keyword 'ce_weigth'; did you mean 'ce_weight'?", TypeError, ce_weigth=1)
    refused(
        mse,
        "projection_mse has no keyword 'temperature'; it has bias, impl, mask, normalize, project, reduction, student, "
        "teacher, weight",
        TypeError,
        temperature=2.0,
    )
    # An option of the other loss only.
    with pytest.raises(TypeError, match="KDLoss has no keyword 'chunk_bytes'"):
        KDLoss(**{"chunk_bytes": 1 << 20})  # pyright: ignore[reportArgumentType]


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "coo": (Tensor.to_sparse, "has the layout torch.sparse_coo; pass {}.to_dense()"),
    "csr": (Tensor.to_sparse_csr, "has the layout torch.sparse_csr; pass {}.to_dense()"),
    "nested": (
        lambda tensor: torch.nested.as_nested_tensor([tensor, tensor]),
        "is a nested tensor; pad it and give the padding the label ignore_index",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_without_plain_memory(layout: str) -> None:
    make, sentence = LAYOUTS[layout]
    case = make_case()
    for call, argument, name, tensor in (
        (plain, "student_logits", "student_logits", case.student_logits),
        (plain, "teacher", "teacher logits", case.teacher_logits),
        (linear, "student_hidden", "student_hidden", case.student_hidden),
        (linear, "student_weight", "student_weight", case.student_weight),
        (mse, "student", "student", zeros(5, 3)),
        (mse, "weight", "weight", zeros(4, 3)),
    ):
        refused(call, f"{name} {sentence.format(name)}", **dict[str, Any]({argument: make(tensor)}))
    top_k = TeacherTopK(*case.teacher_logits.log_softmax(-1).topk(4))
    refused(
        plain,
        f"TeacherTopK.indices {sentence.format('TeacherTopK.indices')}",
        teacher=TeacherTopK(top_k.logprobs, make(top_k.indices)),
    )
    if layout != "csr":  # which has two axes
        for argument, tensor in (("labels", case.labels), ("token_weight", zeros(13))):
            refused(
                plain, f"{argument} {sentence.format(argument)}", **dict[str, Any]({argument: make(tensor)})
            )


def test_tensors_without_values() -> None:
    sentence = "tensors on the device meta have no values; move them to a real device"
    with torch.device("meta"):
        logits, hidden, weight = torch.zeros(13, 67), torch.zeros(13, 8), torch.zeros(67, 8)
    refused(kd_loss, sentence, student_logits=logits, teacher=logits)
    refused(linear_kd_loss, sentence, student_hidden=hidden, student_weight=weight, teacher=logits)
    refused(projection_mse, sentence, student=hidden, teacher=hidden)
    refused(kdkernels.relation_kl, sentence, student_q=hidden[None], teacher_q=hidden[None], heads=2)
    refused(
        kdkernels.contextual_relation_loss, sentence, student=hidden[None, None], teacher=hidden[None, None]
    )


UNDER_TRANSFORMS = (
    "transforms of torch.func (grad, vmap, jvp, ...) see through plain PyTorch only; use impl='reference' there, "
    "or loss.backward()"
)


@pytest.mark.parametrize("impl", [None, *FAST_IMPLS], ids=str)
def test_transforms_of_torch_func_need_the_reference(impl: Impl | None) -> None:
    case = make_case()
    calls: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x: kd_loss(x, case.teacher_logits, case.labels, ce_weight=1.0, impl=impl), case.student_logits),
        (lambda x: linear_kd_loss(x, case.student_weight, case.teacher, impl=impl), case.student_hidden),
        (lambda x: projection_mse(x, case.student_hidden, impl=impl), case.student_hidden),
    ]  # fmt: skip
    for call, tensor in calls:
        for transform in (torch.func.grad, torch.vmap, torch.func.jacrev):
            given = torch.stack([tensor, tensor]) if transform is torch.vmap else tensor
            with pytest.raises(NotImplementedError) as caught:
                transform(call)(given)
            assert str(caught.value) == UNDER_TRANSFORMS


def test_the_reference_under_transforms_of_torch_func() -> None:
    case = make_case()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return kd_loss(logits, case.teacher_logits, labels, ce_weight=0.5, impl="reference")

    student = case.student_logits
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kd_loss(leaf, case.teacher_logits, case.labels, ce_weight=0.5), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student, case.labels), expected)
    both = torch.vmap(loss)(torch.stack([student, 2.0 * student]), torch.stack([case.labels, case.labels]))
    torch.testing.assert_close(
        both, torch.stack([loss(student, case.labels), loss(2.0 * student, case.labels)])
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_jit_trace() -> None:
    case = make_case()
    with pytest.raises(NotImplementedError) as caught:
        torch.jit.trace(kd_loss, (case.student_logits, case.teacher_logits))
    assert str(caught.value) == (
        "torch.jit.trace cannot record the fast back ends; use torch.compile, or impl='reference'"
    )


def inferred(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor of inference_mode, as a teacher often makes them."""
    with torch.inference_mode():
        made = tensor.clone()
    assert made.is_inference()
    return made


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_that_ran_under_inference_mode(impl: Impl, reduction: kdkernels.Reduction) -> None:
    case = make_case()
    logprobs, indices = case.teacher_logits.log_softmax(-1).topk(5)
    cross = teacher_cross_term(case.teacher, case.student_weight, case.student_bias)
    with torch.inference_mode():
        inferred_cross = teacher_cross_term(case.teacher, case.student_weight, case.student_bias)
    head = TeacherHead(
        inferred(case.teacher_hidden), inferred(case.teacher_weight), inferred(case.teacher_bias)
    )
    weight = torch.rand(13, device=DEVICE)
    each: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
        (case.teacher_logits, inferred(case.teacher_logits), {}, {}),
        (case.teacher, head, {}, {}),
        (TeacherTopK(logprobs, indices), TeacherTopK(inferred(logprobs), inferred(indices)), {}, {}),
        (cross, inferred_cross, {}, {}),
        (
            case.teacher,
            head,
            {"token_weight": weight, "divergence": Decoupled(weight)},
            {"token_weight": inferred(weight), "divergence": Decoupled(inferred(weight))},
        ),
        (case.teacher, head, {}, {"labels": inferred(case.labels)}),
    ]
    for given, made, options, other_options in each:
        results = []
        for teacher, changes in ((given, options), (made, other_options)):
            hidden = case.student_hidden.clone().requires_grad_()
            arguments = {
                "labels": case.labels,
                "ce_weight": 0.5,
                "reduction": reduction,
                "impl": impl,
                **changes,
            }
            loss = linear_kd_loss(
                hidden, case.student_weight, teacher, student_bias=case.student_bias, **arguments
            ).sum()
            results.append((loss.detach(), *torch.autograd.grad(loss, hidden, retain_graph=True)))
            results[-1] += torch.autograd.grad(loss, hidden)  # again, from what was kept
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    leaf = case.student_logits.requires_grad_()
    loss = kd_loss(leaf, inferred(case.teacher_logits), reduction=reduction, impl=impl).sum()
    again = kd_loss(leaf, case.teacher_logits, reduction=reduction, impl=impl).sum()
    assert torch.equal(*(torch.autograd.grad(one, leaf)[0] for one in (loss, again)))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_items_although_rows_count(impl: Impl) -> None:
    case = make_case()
    if DEVICE == "cpu":
        sentence = (
            "num_items_in_batch is 0, but 9 row(s) count here; pass the number of counted rows of all micro-batches "
            "together"
        )
        for number in (0, torch.tensor(0)):
            refused(plain, sentence, num_items_in_batch=number, impl=impl)
    ignored = torch.full_like(case.labels, -100)
    for labels in (ignored, ignored[:0]):
        rows = slice(len(labels))
        student = case.student_logits[rows].requires_grad_()
        loss = kd_loss(student, case.teacher_logits[rows], labels, num_items_in_batch=0, impl=impl)
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, student)[0].any()
