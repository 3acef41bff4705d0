"""Who is measured. A contender takes a case's inputs and returns the step to time, or raises why it cannot run.

A step computes the mean loss over the counted rows and the gradients of the student's hidden states and head.
"""

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import losses
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
    from kdkernels import linear_kd_loss

    teacher = losses.teacher_of(case, inputs)
    divergence, mode = losses.divergence_of(case), case.mode
    assert mode == "fast" or mode == "low_memory"
    return _with_backward(
        lambda: linear_kd_loss(
            inputs.student_hidden,
            inputs.student_weight,
            teacher,
            inputs.labels,
            divergence=divergence,
            mode=mode,
        )
    )


def eager(case: Case, inputs: Inputs) -> Step:
    """Plain PyTorch operations. A cross-term stands against the teacher that it stands for."""
    student = (inputs.student_hidden, inputs.student_weight)
    if case.teacher not in ("head", "cross_term"):
        stored = losses.eager_stored_loss if case.teacher == "logits" else losses.eager_top_k_loss
        teacher = losses.teacher_of(case, inputs)
        return _with_backward(lambda: stored(case.divergence, *student, teacher, inputs.labels))
    return _with_backward(
        lambda: losses.eager_loss(
            case.divergence, *student, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
        )
    )


def compiled(case: Case, inputs: Inputs) -> Step:
    """The same eager lines under `torch.compile`."""
    if inputs.student_hidden.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise CannotRun(
            "torch.compile needs a C++ compiler on the CPU, and neither g++ nor clang++ is installed"
        )
    _need_head(case)
    loss = torch.compile(losses.eager_loss)
    return _with_backward(
        lambda: loss(
            case.divergence,
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
        )
    )


def _need_head(case: Case) -> None:
    if case.teacher != "head":
        raise CannotRun(f"takes a teacher as hidden states and a head only, here it comes as {case.teacher}")


def _peer_beta(case: Case) -> float:
    _need_head(case)
    if case.divergence not in PEER_BETA:
        raise CannotRun(f"has no {case.divergence}")
    return PEER_BETA[case.divergence]


def trl(case: Case, inputs: Inputs) -> Step:
    """TRL's `ChunkedDivergenceFunction`. It knows no ignored rows, so its caller picks the counted ones, as its trainer does."""
    try:
        from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
            ChunkedDivergenceFunction,
        )
    except ImportError as error:
        raise CannotRun(f"not installed ({error})") from error
    beta = _peer_beta(case)

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
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_peer_beta(case), ignore_index=IGNORE_INDEX
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
    """The floor: the matrix products that any exact method needs, on the counted rows, nothing between them.

    Four with a teacher's head, three with a stored teacher, two with a frozen head and its cross-term. They write into memory that is there already, so nobody can be faster than this without fewer products.
    """
    hidden, weight, teacher_hidden, teacher_weight = _product_inputs(inputs)
    logits = hidden.new_zeros(len(hidden), case.vocabulary)
    teacher_logits = torch.zeros_like(logits)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def step() -> Tensor:
        torch.mm(hidden, weight.T, out=logits)
        if case.teacher == "head":
            torch.mm(teacher_hidden, teacher_weight.T, out=teacher_logits)
        torch.mm(logits, weight, out=grad_hidden)
        if case.teacher != "cross_term":
            torch.mm(logits.T, hidden, out=grad_weight)
        return grad_hidden

    return step


def plain_products(case: Case, inputs: Inputs) -> Step:
    """The same four products as one writes them: each result in fresh memory, which the system has to hand out."""
    _need_head(case)
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
    "products": "floor: bare matrix products",
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
