"""Who is measured. A contender takes a case's inputs and returns the step to time, or raises why it cannot run.

A step computes the mean loss over the counted rows and the gradients of the student's hidden states and head.
"""

import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import IGNORE_INDEX, Case, Inputs

Step = Callable[[], Tensor]
Contender = Callable[[Case, Inputs], Step]

# TRL's and Liger's name for the divergence is a number: 0 is KL(teacher || student), 1 the other way round.
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class CannotRun(Exception):
    """Why a contender does not take part, in one sentence that the table shows."""


def _with_backward(loss_of: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return step


def ours(case: Case, inputs: Inputs) -> Step:
    """`kdkernels.linear_kd_loss` as it comes: triton on a GPU, torch on a CPU."""
    from kdkernels import TeacherHead, linear_kd_loss

    teacher = TeacherHead(inputs.teacher_hidden, inputs.teacher_weight)
    return _with_backward(
        lambda: linear_kd_loss(
            inputs.student_hidden,
            inputs.student_weight,
            teacher,
            inputs.labels,
            divergence=case.divergence,
        )
    )


def _eager_loss(
    divergence: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    counted: Tensor,
) -> Tensor:
    """What people write: both logit tensors whole, `log_softmax` of each, `F.kl_div`."""
    student = F.log_softmax(F.linear(student_hidden, student_weight), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight), dim=-1)
    if divergence == "forward_kl":
        terms = F.kl_div(student, teacher, reduction="none", log_target=True)
    elif divergence == "reverse_kl":
        terms = F.kl_div(teacher, student, reduction="none", log_target=True)
    elif divergence == "jsd":
        middle = torch.logsumexp(torch.stack([student, teacher]), dim=0) - torch.log(torch.tensor(2.0))
        from_teacher = F.kl_div(middle, teacher, reduction="none", log_target=True)
        from_student = F.kl_div(middle, student, reduction="none", log_target=True)
        terms = (from_teacher + from_student) / 2
    else:
        raise CannotRun(f"no eager lines for {divergence}")
    return (terms.sum(-1) * counted).sum() / counted.sum()


def eager(case: Case, inputs: Inputs) -> Step:
    """Plain PyTorch operations."""
    return _with_backward(
        lambda: _eager_loss(
            case.divergence,
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.counted,
        )
    )


def compiled(case: Case, inputs: Inputs) -> Step:
    """The same eager lines under `torch.compile`."""
    if inputs.student_hidden.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise CannotRun(
            "torch.compile needs a C++ compiler on the CPU, and neither g++ nor clang++ is installed"
        )
    loss = torch.compile(_eager_loss)
    return _with_backward(
        lambda: loss(
            case.divergence,
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.counted,
        )
    )


def trl(case: Case, inputs: Inputs) -> Step:
    """TRL's `ChunkedDivergenceFunction`. It knows no ignored rows, so its caller picks the counted ones, as its trainer does."""
    try:
        from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
            ChunkedDivergenceFunction,
        )
    except ImportError as error:
        raise CannotRun(f"not installed ({error})") from error
    beta = PEER_BETA[case.divergence]

    def loss() -> Tensor:
        student_hidden, teacher_hidden = inputs.student_hidden, inputs.teacher_hidden
        if case.masked:
            student_hidden, teacher_hidden = student_hidden[inputs.counted], teacher_hidden[inputs.counted]
        divergence, _entropy = ChunkedDivergenceFunction.apply(
            student_hidden, inputs.student_weight, None, teacher_hidden, inputs.teacher_weight, None, beta
        )
        return divergence.mean()

    return _with_backward(loss)


def liger(case: Case, inputs: Inputs) -> Step:
    """Liger's chunked `LigerFusedLinearJSDLoss`, compiled as it is by default, without its hard loss."""
    try:
        from liger_kernel.chunked_loss.jsd_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSDLoss,
        )
    except ImportError as error:
        raise CannotRun(f"not installed ({error})") from error
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[case.divergence], ignore_index=IGNORE_INDEX
    )
    return _with_backward(
        lambda: loss(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
        )
    )


def products(case: Case, inputs: Inputs) -> Step:
    """The floor: the four matrix products that any exact method needs, on the counted rows, nothing between them.

    They write into memory that is there already, so nobody can be faster than this without fewer products.
    """
    hidden, weight, teacher_hidden, teacher_weight = _product_inputs(inputs)
    logits = hidden.new_zeros(len(hidden), case.vocabulary)
    teacher_logits = torch.zeros_like(logits)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def step() -> Tensor:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=teacher_logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)
        return grad_hidden

    return step


def plain_products(case: Case, inputs: Inputs) -> Step:
    """The same four products as one writes them: each result in fresh memory, which the system has to hand out."""
    hidden, weight, teacher_hidden, teacher_weight = _product_inputs(inputs)

    def step() -> Tensor:
        logits = hidden @ weight.T
        teacher_logits = teacher_hidden @ teacher_weight.T
        grad_hidden, grad_weight = logits @ weight, logits.T @ hidden
        del teacher_logits, grad_weight
        return grad_hidden

    return step


def _product_inputs(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = inputs.counted.nonzero().squeeze(1)
    hidden, weight = inputs.student_hidden.detach()[rows], inputs.student_weight.detach()
    return hidden, weight, inputs.teacher_hidden[rows], inputs.teacher_weight


def copy(case: Case, inputs: Inputs) -> Step:
    """What one trip through memory costs: a copy of one logit tensor of the counted rows."""
    source = inputs.teacher_hidden.new_ones(int(inputs.counted.sum()), case.vocabulary)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


CONTENDERS: dict[str, Contender] = {
    "products": products,
    "plain_products": plain_products,
    "copy": copy,
    "ours": ours,
    "eager": eager,
    "compile": compiled,
    "trl": trl,
    "liger": liger,
}
LABELS = {
    "products": "floor: four bare matrix products",
    "plain_products": "the same products, results in fresh memory",
    "copy": "copy of one logit tensor",
    "ours": "kdkernels",
    "eager": "eager PyTorch",
    "compile": "torch.compile of eager",
    "trl": "TRL ChunkedDivergenceFunction",
    "liger": "Liger LigerFusedLinearJSDLoss (chunked)",
}
# These are yardsticks: they compute no loss, so they have no error to show.
YARDSTICKS = frozenset({"products", "plain_products", "copy"})
