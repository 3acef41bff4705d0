"""The public implementations, each as its own project calls it, and the sentence that stands where one cannot run.

Of every peer the default settings are measured, without a hard loss. `tests/test_benchmark_operations.py` holds TRL's and
torch's own to the same loss and gradients as ours; of the others the error against fp64 in their row of the table says it.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import IGNORE_INDEX, Case, Inputs
from benchmarks.operation import CannotRun, Step, need_gpu, with_backward

# TRL's and Liger's name for the divergence is a number: 0 is KL(teacher || student), 1 the other way round.
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def find(module: str, name: str) -> Any:
    """A peer's function or class, from a package that need not be there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a peer has to say at its import is no finding
            return getattr(import_module(module), name)
    except ImportError as error:
        raise CannotRun(f"not installed ({error})") from error


def need_head(case: Case) -> None:
    """For who takes no stored teacher."""
    if case.teacher != "head":
        raise CannotRun(f"takes a teacher as hidden states and a head only, here it comes as {case.teacher}")


def beta_of(case: Case) -> float:
    """The divergence as TRL and Liger number it."""
    need_head(case)
    if case.divergence not in PEER_BETA:
        raise CannotRun(f"has no {case.divergence}")
    return PEER_BETA[case.divergence]


def need_forward_kl(case: Case) -> None:
    """For who has that one divergence."""
    if case.divergence != "forward_kl":
        raise CannotRun(f"has no {case.divergence}")


def counted_hidden(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states of student and teacher for who knows no ignored rows: its caller picks the others."""
    sides = (inputs.student_hidden, inputs.teacher_hidden)
    return (sides[0][inputs.counted], sides[1][inputs.counted]) if case.masked else sides


def of_both_heads(loss: Callable[..., Tensor], inputs: Inputs) -> Step:
    """A step of Liger's losses that take hidden states and head of either side."""
    return with_backward(
        lambda: loss(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
        )
    )


def trl(case: Case, inputs: Inputs) -> Step:
    """TRL's `ChunkedDivergenceFunction`, on the counted rows, as its trainer calls it."""
    function, beta = find("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction"), beta_of(case)

    def loss() -> Tensor:
        student, teacher = counted_hidden(case, inputs)
        divergence, _entropy = function.apply(
            student, inputs.student_weight, None, teacher, inputs.teacher_weight, None, beta
        )
        return divergence.mean()

    return with_backward(loss)


def liger_chunked(case: Case, inputs: Inputs) -> Step:
    """Liger's chunked `LigerFusedLinearJSDLoss`, compiled as it is by default."""
    loss = find("liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta_of(case), ignore_index=IGNORE_INDEX
    )
    return of_both_heads(loss, inputs)


def liger_jsd(case: Case, inputs: Inputs) -> Step:
    """Liger's `LigerFusedLinearJSD`."""
    make = find("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
    loss = make(jsd_beta=beta_of(case), ignore_index=IGNORE_INDEX)
    need_gpu(case)
    return of_both_heads(loss, inputs)


def liger_kl(case: Case, inputs: Inputs) -> Step:
    """Liger's `LigerFusedLinearKLDivLoss`. The teacher's probabilities stand ready: nobody pays for their softmax."""
    make = find("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")
    if case.teacher != "logits":
        raise CannotRun(f"takes a teacher as probabilities only, here it comes as {case.teacher}")
    need_forward_kl(case)
    need_gpu(case)
    loss = make(ignore_index=IGNORE_INDEX)
    with torch.no_grad():
        target = F.linear(inputs.teacher_hidden, inputs.teacher_weight).softmax(-1)
    return with_backward(lambda: loss(inputs.student_hidden, inputs.student_weight, target, inputs.labels))


def fla(case: Case, inputs: Inputs) -> Step:
    """fla's `fused_kl_div_loss`, on the counted rows."""
    loss = find("fla.modules.fused_kl_div", "fused_kl_div_loss")
    need_head(case)
    need_forward_kl(case)
    need_gpu(case)

    def of_counted() -> Tensor:
        student, teacher = counted_hidden(case, inputs)
        return loss(student, teacher, inputs.student_weight, inputs.teacher_weight)

    return with_backward(of_counted)


# ---- cross entropy alone


def torch_linear_cross_entropy(case: Case, inputs: Inputs) -> Step:
    """torch's own `linear_cross_entropy`, in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise CannotRun(f"the linear_cross_entropy of torch {torch.__version__} has no chunks")
    chunks = options()
    return with_backward(
        lambda: F.linear_cross_entropy(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.labels,
            ignore_index=IGNORE_INDEX,
            options=chunks,
        )
    )


def liger_cross_entropy(case: Case, inputs: Inputs) -> Step:
    """Liger's `LigerFusedLinearCrossEntropyLoss`."""
    make = find("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    need_gpu(case)
    loss = make(ignore_index=IGNORE_INDEX)
    return with_backward(lambda: loss(inputs.student_weight, inputs.student_hidden, inputs.labels))


def cut_cross_entropy(case: Case, inputs: Inputs) -> Step:
    """Apple's cut-cross-entropy: `linear_cross_entropy`, with its filter as it comes."""
    loss = find("cut_cross_entropy", "linear_cross_entropy")
    need_gpu(case)
    return with_backward(
        lambda: loss(inputs.student_hidden, inputs.student_weight, inputs.labels, ignore_index=IGNORE_INDEX)
    )
