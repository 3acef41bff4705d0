"""`python -m benchmarks.numerics`: gradient errors against fp64, ours beside eager PyTorch and public peers, on a CPU.

Prints the tables of docs/numerics.md. TRL and Liger take part when they can be imported.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent / "kernels")
)  # the checkout, whatever is installed

from kdkernels import TeacherHead, linear_kd_loss

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Noise of the student over the teacher: forward KL of about 1e-4, 1e-2, 1 and 10 nats.
DISTANCES = (0.003, 0.03, 0.3, 0.9)
# Divides the sum of the rows in place of their number, so that float16 gradients do not underflow: what a loss scale does.
SCALE = 1.0 / 64.0


@dataclass(frozen=True)
class Heads:
    """Hidden states and heads of both models, in the dtype under test."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    def to(self, dtype: torch.dtype) -> "Heads":
        """The same numbers in another dtype; the student's are fresh leaves."""
        moved = [tensor.detach().to(dtype).clone() for tensor in vars(self).values()]
        return Heads(moved[0].requires_grad_(), moved[1].requires_grad_(), *moved[2:])


Results = tuple[Tensor, Tensor, Tensor]  # sum of the row losses, gradients of hidden states and head
Solver = Callable[[Heads, str], Results]


def make_heads(rows: int, width: int, vocabulary: int, distance: float, dtype: torch.dtype) -> Heads:
    """A teacher with logits of standard deviation 4, and a student that is it plus noise; both rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(rows, width), normal(vocabulary, width) * (4.0 / width**0.5)
    noisy = hidden + distance * normal(rows, width)
    noisy_weight = weight + distance * normal(vocabulary, width) * (4.0 / width**0.5)
    # As the student is the teacher plus noise, so is its rounding: both start from rounded teachers.
    tensors = (noisy, noisy_weight, hidden, weight)
    return Heads(*(tensor.to(dtype) for tensor in tensors))


def finish(loss: Tensor, heads: Heads) -> Results:
    """Loss and gradients of `loss` / SCALE."""
    gradients = torch.autograd.grad(loss / SCALE, (heads.student_hidden, heads.student_weight))
    return loss.detach().double(), gradients[0].double(), gradients[1].double()


def ours(heads: Heads, divergence: str, impl: str = "torch") -> Results:
    """`linear_kd_loss`."""
    teacher = TeacherHead(heads.teacher_hidden, heads.teacher_weight)
    assert impl == "torch" or impl == "reference"
    loss = linear_kd_loss(
        heads.student_hidden, heads.student_weight, teacher, divergence=divergence, reduction="sum", impl=impl
    )
    return finish(loss, heads)


def ours_from_float64(heads: Heads, divergence: str) -> Results:
    """`linear_kd_loss` of inputs cast to float64; autograd rounds the gradients to the inputs' dtype."""
    wide = Heads(*(tensor.double() for tensor in vars(heads).values()))
    teacher = TeacherHead(wide.teacher_hidden, wide.teacher_weight)
    loss = linear_kd_loss(
        wide.student_hidden, wide.student_weight, teacher, divergence=divergence, reduction="sum"
    )
    return finish(loss, heads)


def eager(heads: Heads, divergence: str) -> Results:
    """`F.linear`, `log_softmax` and `F.kl_div` in the dtype of the inputs."""
    student = F.log_softmax(F.linear(heads.student_hidden, heads.student_weight), -1)
    teacher = F.log_softmax(F.linear(heads.teacher_hidden, heads.teacher_weight), -1)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    if divergence == "jsd":
        middle = torch.logsumexp(torch.stack([student, teacher]), 0) - torch.log(torch.tensor(2.0))
        return finish((kl(teacher, middle) + kl(student, middle)) / 2, heads)
    return finish(kl(teacher, student) if divergence == "forward_kl" else kl(student, teacher), heads)


def trl(heads: Heads, divergence: str) -> Results:
    """TRL's `ChunkedDivergenceFunction`."""
    from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
        ChunkedDivergenceFunction,
    )

    rows, _entropy = ChunkedDivergenceFunction.apply(
        heads.student_hidden, heads.student_weight, None, heads.teacher_hidden, heads.teacher_weight, None,
        BETA[divergence],
    )  # fmt: skip
    return finish(rows.sum(), heads)


def liger(heads: Heads, divergence: str) -> Results:
    """Liger's `LigerFusedLinearJSDLoss`, not compiled; its mean over rows brought back to the sum."""
    from liger_kernel.chunked_loss.jsd_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSDLoss,
    )

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[divergence], ignore_index=-100, compiled=False
    )
    rows = heads.student_hidden.shape[0]
    labels = torch.zeros(rows, dtype=torch.int64)
    mean = loss(
        heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight, labels
    )
    return finish(mean * rows, heads)


SOLVERS: dict[str, Solver] = {
    "ours": ours,
    "ours, inputs cast to float64": ours_from_float64,
    "eager": eager,
    "TRL": trl,
    "Liger": liger,
}


def relative(actual: Tensor, truth: Tensor) -> float:
    """Euclidean norm of the difference over that of the truth."""
    return ((actual - truth).norm() / truth.norm()).item()


@dataclass(frozen=True)
class Line:
    """Errors of one case: of an exact gradient rounded once, and of each solver (value, hidden, head)."""

    vocabulary: int
    dtype: str
    divergence: str
    value: float  # exact, nats per row
    rounded: tuple[float, float]
    errors: dict[str, tuple[float, float, float] | str]


def measure(rows: int, width: int, vocabulary: int, distance: float, dtype: str, divergence: str) -> Line:
    """Solve one case by everybody."""
    given = make_heads(rows, width, vocabulary, distance, DTYPES[dtype])
    exact = ours(given.to(torch.float64), divergence, "reference")
    rounded = tuple(relative(gradient.to(DTYPES[dtype]).double(), gradient) for gradient in exact[1:])
    errors: dict[str, tuple[float, float, float] | str] = {}
    for name, solve in SOLVERS.items():
        try:
            found = solve(given.to(DTYPES[dtype]), divergence)
        except ImportError:
            errors[name] = "not installed"
        except Exception as error:  # a peer may fail in any way; the table shows how
            errors[name] = type(error).__name__
        else:
            errors[name] = tuple(relative(ours, truth) for ours, truth in zip(found, exact, strict=True))  # pyright: ignore[reportArgumentType]
    return Line(vocabulary, dtype, divergence, exact[0].item() / rows, (rounded[0], rounded[1]), errors)


def cell(error: tuple[float, float, float] | str) -> str:
    """Value, hidden and head."""
    return error if isinstance(error, str) else " / ".join(f"{part:.0e}" for part in error)


def table(lines: list[Line]) -> str:
    """Markdown."""
    names = list(SOLVERS)
    head = f"| V | inputs | divergence | exact value | rounded once | {' | '.join(names)} |"
    rule = "|" + "---|" * (5 + len(names))
    rows = [
        f"| {line.vocabulary} | {line.dtype} | {line.divergence} | {line.value:.1e} "
        f"| {line.rounded[0]:.0e} / {line.rounded[1]:.0e} | {' | '.join(cell(line.errors[name]) for name in names)} |"
        for line in lines
    ]
    return "\n".join([head, rule, *rows])


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", choices=list(BETA), default=list(BETA))
    chosen = parser.parse_args(arguments)
    lines = [
        measure(chosen.rows, chosen.width, vocabulary, distance, dtype, divergence)
        for vocabulary in chosen.vocabularies
        for dtype in chosen.dtypes
        for divergence in chosen.divergences
        for distance in DISTANCES
    ]
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
