"""The losses between inner layers beside the eager lines that their docstrings replace: `python -m benchmarks --suite features`.

Loss and gradients of the student's tensors. The floor of a projection is its three bare products; that of relation_kl is
one pair of an attention's passes, forward and backward, over maps of the same size.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operation import Operation, Step, with_backward


@dataclass(frozen=True)
class Case:
    """Features (batch, tokens, width) of a student and a teacher."""

    operation: str  # a key of EAGER
    batch: int
    tokens: int
    width: int
    teacher_width: int
    heads: int = 0  # of relation_kl
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def family(self) -> str:
        return "features"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def name(self) -> str:
        heads = f", {self.heads} heads" if self.heads else ""
        return (
            f"{self.operation}, B={self.batch}, N={self.tokens}, D_s={self.width}, D_t={self.teacher_width}{heads}, "
            f"{self.dtype}"
        )


def _gpu(operation: str, *sizes: int) -> Case:
    return Case(operation, *sizes, dtype="bfloat16", device="cuda")


CPU = (
    Case("projection_mse", 8, 512, 384, 768),
    Case("projection_mse, normalized, teacher projected", 8, 512, 384, 768),
    Case("cosine_loss", 8, 512, 384, 768),
    Case("relation_kl", 2, 1024, 384, 768, 12),
    Case("relation_kl of queries and keys, causal", 2, 1024, 384, 768, 12),
)
GPU = (
    _gpu("projection_mse", 8, 1024, 2048, 4096),
    _gpu("projection_mse", 16, 512, 384, 768),  # a student of the study under CodeBERT
    _gpu("relation_kl", 4, 4096, 768, 768, 12),
    _gpu("relation_kl of queries and keys, causal", 4, 4096, 768, 768, 12),
)
SMOKE = (
    Case("projection_mse", 2, 64, 32, 48),
    Case("cosine_loss", 2, 64, 32, 48),
    Case("relation_kl", 2, 64, 32, 48, 4),
    Case("relation_kl of queries and keys, causal", 2, 64, 32, 48, 4),
)


@dataclass(frozen=True)
class Inputs:
    """Features of both sides, and what goes with them."""

    student: Tensor  # (B, N, D_s)
    other: Tensor  # the student's keys (B, N, D_s), or the projection
    teacher: Tensor  # (B, N, D_t)
    teacher_other: Tensor  # the teacher's keys


def leaves(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The student's features, and its keys or the projection (`weight`) where the loss has any."""
    more = {} if case.operation == "relation_kl" else {"weight": inputs.other}
    return {"hidden": inputs.student, **more}


def make_inputs(case: Case) -> Inputs:
    """Features of one latent meaning a token on both sides, the student's noisier."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    def features(width: int, noise: float) -> Tensor:
        meaning = normal(case.batch, case.tokens, 32) @ normal(32, width) / 8.0
        return (meaning + noise * normal(case.batch, case.tokens, width)).to(getattr(torch, case.dtype))

    student, teacher = features(case.width, 0.7), features(case.teacher_width, 0.5)
    if case.heads:
        other, teacher_other = features(case.width, 0.7), features(case.teacher_width, 0.5)
    else:
        shape = (case.teacher_width, case.width)
        shape = shape[::-1] if "teacher projected" in case.operation else shape
        other, teacher_other = (normal(*shape) / math.sqrt(shape[1])).to(teacher.dtype), teacher
    return Inputs(student.requires_grad_(), other.requires_grad_(), teacher, teacher_other)


def _eager_relations(case: Case, inputs: Inputs) -> Tensor:
    causal = "causal" in case.operation
    student_k, teacher_k = (
        (inputs.other, inputs.teacher_other) if "keys" in case.operation else (inputs.student, inputs.teacher)
    )

    def log_relations(q: Tensor, k: Tensor) -> Tensor:
        q, k = (side.unflatten(2, (case.heads, -1)).transpose(1, 2) for side in (q, k))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if causal:
            # A finite fill, as libraries of models have it: F.kl_div makes NaN of -inf on both sides.
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        return F.log_softmax(scores, -1)

    with torch.no_grad():
        teacher = log_relations(inputs.teacher, teacher_k)
    student = log_relations(inputs.student, student_k)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def _eager_normalized(case: Case, inputs: Inputs) -> Tensor:
    projected = F.linear(inputs.teacher, inputs.other)
    return F.mse_loss(F.normalize(inputs.student, dim=-1), F.normalize(projected, dim=-1))


def _eager_cosine(case: Case, inputs: Inputs) -> Tensor:
    projected = F.linear(inputs.student, inputs.other)
    return (1.0 - F.cosine_similarity(projected, inputs.teacher, dim=-1)).mean()


def _eager_mse(case: Case, inputs: Inputs) -> Tensor:
    return F.mse_loss(F.linear(inputs.student, inputs.other), inputs.teacher)


EAGER: dict[str, Callable[[Case, Inputs], Tensor]] = {
    "projection_mse": _eager_mse,
    "projection_mse, normalized, teacher projected": _eager_normalized,
    "cosine_loss": _eager_cosine,
    "relation_kl": _eager_relations,
    "relation_kl of queries and keys, causal": _eager_relations,
}


def ours(case: Case, inputs: Inputs, impl: Any = None) -> Tensor:
    """The library's loss as it comes: triton on a GPU, torch on a CPU."""
    from kdkernels import cosine_loss, projection_mse, relation_kl

    student, other, teacher = inputs.student, inputs.other, inputs.teacher
    if case.operation == "cosine_loss":
        return cosine_loss(student, teacher, other, impl=impl)
    if case.operation.startswith("projection"):
        normalize = "normalized" in case.operation
        project = "teacher" if "teacher" in case.operation else "student"
        return projection_mse(student, teacher, other, normalize=normalize, project=project, impl=impl)
    keys = (other, inputs.teacher_other) if "keys" in case.operation else ()
    return relation_kl(
        student, teacher, *keys, heads=case.heads, causal="causal" in case.operation, impl=impl
    )


def _floor(case: Case, inputs: Inputs) -> Step:
    """What nothing exact is faster than, or, for relations, what the known kernels of the same products take."""
    if case.heads:
        q, k = (
            side.detach().unflatten(2, (case.heads, -1)).transpose(1, 2).requires_grad_()
            for side in (inputs.student, inputs.other)
        )
        causal = "causal" in case.operation

        def attention() -> Tensor:
            q.grad = k.grad = None
            total = F.scaled_dot_product_attention(q, k, k, is_causal=causal).sum()
            total.backward()
            return total.detach()

        return attention
    projects_teacher = "teacher projected" in case.operation
    source = inputs.teacher if projects_teacher else inputs.student.detach()
    source, weight = source.flatten(0, 1), inputs.other.detach()
    projected, d_source, d_weight = (
        source.new_zeros(len(source), len(weight)),
        torch.zeros_like(source),
        torch.zeros_like(weight),
    )

    def products() -> Tensor:
        torch.mm(source, weight.T, out=projected)
        if not projects_teacher:
            torch.mm(projected, weight, out=d_source)
        return torch.mm(projected.T, source, out=d_weight)

    return products


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The torch back end in fp64; the tests hold it to the reference, which would not fit."""
    exact = Inputs(*(side.detach().double() for side in vars(inputs).values()))
    named = {name: leaf.requires_grad_() for name, leaf in leaves(case, exact).items()}
    loss = ours(case, exact, impl="torch")
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **dict(zip(named, gradients, strict=True))}


OPERATION = Operation(
    case=Case,
    make_inputs=make_inputs,
    contenders={
        "floor": _floor,
        "ours": lambda case, inputs: with_backward(lambda: ours(case, inputs)),
        "eager": lambda case, inputs: with_backward(lambda: EAGER[case.operation](case, inputs)),
    },
    leaves=leaves,
    labels={
        "floor": "floor: bare products, or an attention",
        "ours": "kdkernels",
        "eager": "eager PyTorch",
    },
    tests=("tests/losses/test_projection_mse.py", "tests/losses/test_relation_kl.py"),
    truth=truth,
    floor="floor",
    yardsticks=frozenset({"floor"}),
)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["--suite", "features", *sys.argv[1:]]))
