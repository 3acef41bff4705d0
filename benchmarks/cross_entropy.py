"""Cross entropy alone, from hidden states and head: the row of plain training, in which no teacher is asked."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import linear_kd, peers
from benchmarks.cases import IGNORE_INDEX, Case, Inputs, make_inputs
from benchmarks.operation import Operation, Step, with_backward


def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What people write."""
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE_INDEX)


def ours(case: Case, inputs: Inputs) -> Step:
    """`linear_kd_loss` with kd_weight 0, as `kdtrain` trains without a teacher: one number stands for its logits."""
    from kdkernels import TeacherLogits, linear_kd_loss

    nothing = inputs.teacher_hidden.new_zeros(()).expand(case.tokens, case.vocabulary)
    return with_backward(
        lambda: linear_kd_loss(
            inputs.student_hidden,
            inputs.student_weight,
            TeacherLogits(nothing),
            inputs.labels,
            kd_weight=0.0,
            ce_weight=1.0,
        )
    )


def eager(case: Case, inputs: Inputs) -> Step:
    """Logits whole, then `F.cross_entropy`."""
    return with_backward(lambda: loss_of(inputs.student_hidden, inputs.student_weight, inputs.labels))


def compiled(case: Case, inputs: Inputs) -> Step:
    """The same under `torch.compile`."""
    linear_kd.need_compiler(case.device)
    loss = torch.compile(loss_of)
    return with_backward(lambda: loss(inputs.student_hidden, inputs.student_weight, inputs.labels))


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The eager lines in fp64, a few rows at a time."""
    hidden = inputs.student_hidden.detach().double().requires_grad_()
    weight = inputs.student_weight.detach().double().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64, device=case.device), inputs.counted.sum()
    for rows, labels in zip(
        hidden.split(linear_kd.TRUTH_ROWS), inputs.labels.split(linear_kd.TRUTH_ROWS), strict=True
    ):
        loss = F.cross_entropy(F.linear(rows, weight), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        (loss / count).backward()
        total += loss.detach() / count
    assert hidden.grad is not None and weight.grad is not None
    return {"loss": total, "hidden": hidden.grad, "weight": weight.grad}


OPERATION = Operation(
    case=Case,
    make_inputs=make_inputs,
    contenders={
        "products": linear_kd.products,
        "plain_products": linear_kd.plain_products,
        "copy": linear_kd.copy,
        "ours": ours,
        "eager": eager,
        "compile": compiled,
        "torch_ce": peers.torch_linear_cross_entropy,
        "liger_ce": peers.liger_cross_entropy,
        "cut_ce": peers.cut_cross_entropy,
    },
    leaves=linear_kd.leaves,
    labels={
        **linear_kd.YARDSTICK_LABELS,
        "ours": "kdkernels",
        "eager": "eager PyTorch",
        "compile": "torch.compile of eager",
        "torch_ce": "torch linear_cross_entropy (chunked)",
        "liger_ce": "Liger LigerFusedLinearCrossEntropyLoss",
        "cut_ce": "cut-cross-entropy",
    },
    tests=("tests/losses/test_labels_only.py",),
    truth=truth,
    yardsticks=linear_kd.YARDSTICKS,
)
