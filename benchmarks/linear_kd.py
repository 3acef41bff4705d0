"""`linear_kd_loss`, from hidden states and heads to gradients: who is measured at it, and the exact answer.

A contender takes a case's inputs and returns the step to time, or raises why it cannot run. A step computes the mean loss
over the counted rows and the gradients of the student's hidden states and head.
"""

import shutil

import torch
from torch import Tensor

from benchmarks import losses, peers
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.operation import CannotRun, Operation, Step, with_backward

TRUTH_ROWS = 64  # rows of fp64 logits held at a time


def ours(case: Case, inputs: Inputs) -> Step:
    """`kdkernels.linear_kd_loss` as it comes: triton on a GPU, torch on a CPU."""
    from kdkernels import linear_kd_loss

    teacher = losses.teacher_of(case, inputs)
    divergence, mode = losses.divergence_of(case), case.mode
    assert mode == "fast" or mode == "low_memory"
    chunk_bytes = None if case.chunk_rows is None else 8 * case.vocabulary * case.chunk_rows
    return with_backward(
        lambda: linear_kd_loss(
            inputs.student_hidden,
            inputs.student_weight,
            teacher,
            inputs.labels,
            divergence=divergence,
            mode=mode,
            chunk_bytes=chunk_bytes,
        )
    )


def eager(case: Case, inputs: Inputs) -> Step:
    """Plain PyTorch operations. A cross-term stands against the teacher that it stands for."""
    student = (inputs.student_hidden, inputs.student_weight)
    if case.teacher not in ("head", "cross_term"):
        stored = losses.eager_stored_loss if case.teacher == "logits" else losses.eager_top_k_loss
        teacher = losses.teacher_of(case, inputs)
        return with_backward(lambda: stored(case.divergence, *student, teacher, inputs.labels))
    return with_backward(
        lambda: losses.eager_loss(
            case.divergence, *student, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
        )
    )


def compiled(case: Case, inputs: Inputs) -> Step:
    """The same eager lines under `torch.compile`."""
    need_compiler(case.device)
    peers.need_head(case)
    loss = torch.compile(losses.eager_loss)
    return with_backward(
        lambda: loss(
            case.divergence,
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
        )
    )


def need_compiler(device: str) -> None:
    """For what torch.compile writes for a CPU."""
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise CannotRun(
            "torch.compile needs a C++ compiler on the CPU, and neither g++ nor clang++ is installed"
        )


def products(case: Case, inputs: Inputs) -> Step:
    """The floor: the matrix products that any exact method needs, on the counted rows, nothing between them.

    Four with a teacher's head, three with a stored teacher or none, two with a frozen head and its cross-term. They write
    into memory that is there already, so nobody can be faster than this without fewer products.
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
    """The same products as one writes them: each result in fresh memory, which the system has to hand out."""
    hidden, weight, teacher_hidden, teacher_weight = _product_inputs(inputs)

    def step() -> Tensor:
        logits = hidden @ weight.T
        teacher_logits = teacher_hidden @ teacher_weight.T if case.teacher == "head" else None
        grad_hidden = logits @ weight
        grad_weight = logits.T @ hidden if case.teacher != "cross_term" else None
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


def leaves(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Hidden states, and the head where it is trained."""
    head = {"weight": inputs.student_weight} if inputs.student_weight.requires_grad else {}
    return {"hidden": inputs.student_hidden, **head}


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Loss and gradients in fp64, by `impl="reference"` on a few rows at a time so that it fits in memory."""
    from kdkernels import linear_kd_loss

    hidden = inputs.student_hidden.detach().double().requires_grad_()
    frozen = not inputs.student_weight.requires_grad
    weight = inputs.student_weight.detach().double().requires_grad_(not frozen)
    # A top k is what is stored of a float32 teacher; the other forms are the teacher itself.
    double = None if case.teacher.startswith("top_k") else torch.float64
    teacher = losses.teacher_of(case, inputs, double)
    total = torch.zeros((), dtype=torch.float64, device=case.device)
    for start in range(0, case.tokens, TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        loss = linear_kd_loss(
            hidden[rows],
            weight,
            losses.rows_of(teacher, rows),
            inputs.labels[rows],
            divergence=losses.divergence_of(case),
            reduction="sum",
            impl="reference",
        )
        loss.backward()
        total += loss.detach()
    count = inputs.counted.sum()
    gradients = {
        name: leaf.grad / count
        for name, leaf in (("hidden", hidden), ("weight", weight))
        if leaf.grad is not None
    }
    return {"loss": total / count, **gradients}


YARDSTICKS = frozenset({"products", "plain_products", "copy"})
YARDSTICK_LABELS = {
    "products": "floor: bare matrix products",
    "plain_products": "the same products, results in fresh memory",
    "copy": "copy of one logit tensor",
}

OPERATION = Operation(
    case=Case,
    make_inputs=make_inputs,
    contenders={
        "products": products,
        "plain_products": plain_products,
        "copy": copy,
        "ours": ours,
        "eager": eager,
        "compile": compiled,
        "trl": peers.trl,
        "liger": peers.liger_chunked,
        "liger_jsd": peers.liger_jsd,
        "liger_kl": peers.liger_kl,
        "fla": peers.fla,
    },
    leaves=leaves,
    labels={
        **YARDSTICK_LABELS,
        "ours": "kdkernels",
        "eager": "eager PyTorch",
        "compile": "torch.compile of eager",
        "trl": "TRL ChunkedDivergenceFunction",
        "liger": "Liger LigerFusedLinearJSDLoss (chunked)",
        "liger_jsd": "Liger LigerFusedLinearJSD",
        "liger_kl": "Liger LigerFusedLinearKLDivLoss",
        "fla": "fla fused_kl_div_loss",
    },
    tests=("tests/losses/test_linear_kd_loss.py", "tests/losses/test_divergences.py"),
    truth=truth,
    yardsticks=YARDSTICKS,
)
