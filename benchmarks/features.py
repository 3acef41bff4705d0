"""`python -m benchmarks.features`: the losses between inner layers beside the eager lines that their docstrings replace.

Loss and gradients of the student's tensors. Protocol as in benchmarks/README.md: a process for each contender, rounds in
which each takes one turn, ratios within a round, errors against float64. The floor of a projection is its three bare
products; that of relation_kl is one pair of an attention's passes, forward and backward, over maps of the same size.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import environment, peak_bytes_of, seconds_of

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 2


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
    def name(self) -> str:
        heads = f", {self.heads} heads" if self.heads else ""
        return (
            f"{self.operation}, B={self.batch}, N={self.tokens}, D_s={self.width}, D_t={self.teacher_width}{heads}, "
            f"{self.dtype}"
        )


def _gpu(operation: str, *sizes: int) -> Case:
    return Case(operation, *sizes, dtype="bfloat16", device="cuda")


SUITES = {
    "cpu": (
        Case("projection_mse", 8, 512, 384, 768),
        Case("projection_mse, normalized, teacher projected", 8, 512, 384, 768),
        Case("cosine_loss", 8, 512, 384, 768),
        Case("relation_kl", 2, 1024, 384, 768, 12),
        Case("relation_kl of queries and keys, causal", 2, 1024, 384, 768, 12),
    ),
    "gpu": (
        _gpu("projection_mse", 8, 1024, 2048, 4096),
        _gpu("relation_kl", 4, 4096, 768, 768, 12),
        _gpu("relation_kl of queries and keys, causal", 4, 4096, 768, 768, 12),
    ),
    "smoke": (
        Case("projection_mse", 2, 64, 32, 48),
        Case("cosine_loss", 2, 64, 32, 48),
        Case("relation_kl", 2, 64, 32, 48, 4),
    ),
}


@dataclass(frozen=True)
class Inputs:
    """Leaves first: what the loss is differentiated for."""

    student: Tensor  # (B, N, D_s)
    other: Tensor  # the student's keys (B, N, D_s), or the projection
    teacher: Tensor  # (B, N, D_t)
    teacher_other: Tensor  # the teacher's keys

    def leaves(self, case: Case) -> list[Tensor]:
        return [self.student] if case.operation == "relation_kl" else [self.student, self.other]


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


def _floor(case: Case, inputs: Inputs) -> Callable[[], object]:
    """What nothing exact is faster than, or, for relations, what the known kernels of the same products take."""
    if case.heads:
        q, k = (
            side.detach().unflatten(2, (case.heads, -1)).transpose(1, 2).requires_grad_()
            for side in (inputs.student, inputs.other)
        )
        causal = "causal" in case.operation

        def attention() -> None:
            q.grad = k.grad = None
            F.scaled_dot_product_attention(q, k, k, is_causal=causal).sum().backward()

        return attention
    source = inputs.teacher if "teacher projected" in case.operation else inputs.student.detach()
    source, weight = source.flatten(0, 1), inputs.other.detach()
    projected, d_source, d_weight = (
        source.new_zeros(len(source), len(weight)),
        torch.zeros_like(source),
        torch.zeros_like(weight),
    )

    def products() -> None:
        torch.mm(source, weight.T, out=projected)
        if source is not inputs.teacher:
            torch.mm(projected, weight, out=d_source)
        torch.mm(projected.T, source, out=d_weight)

    return products


CONTENDERS = ("ours", "eager", "floor")


def _step(contender: str, case: Case, inputs: Inputs) -> Callable[[], object]:
    if contender == "floor":
        return _floor(case, inputs)
    loss_of = ours if contender == "ours" else EAGER[case.operation]
    leaves = inputs.leaves(case)

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(case, inputs)
        loss.backward()
        return loss.detach()

    return step


def _errors(step: Callable[[], object], leaves: list[Tensor], truth: Path, device: str) -> dict[str, float]:
    exact = torch.load(truth, weights_only=True, map_location=device)
    loss = step()
    assert isinstance(loss, Tensor)
    gradients = [leaf.grad.double() for leaf in leaves if leaf.grad is not None]
    errors = [
        ((ours - other).norm() / other.norm()).item()
        for ours, other in zip(gradients, exact["gradients"], strict=True)
    ]
    return {
        "loss_error": ((loss.double() - exact["loss"]).abs() / exact["loss"]).item(),
        "gradient_error": max(errors),
    }


def serve(contender: str, case: Case, truth: Path) -> Iterator[dict[str, Any]]:
    """One contender in its process: an answer for every order on stdin; "truth" writes a file and ends."""
    inputs = make_inputs(case)
    if contender == "truth":
        exact = Inputs(*(side.detach().double() for side in vars(inputs).values()))
        leaves = [leaf.requires_grad_() for leaf in exact.leaves(case)]
        loss = ours(case, exact, impl="torch")
        torch.save({"loss": loss.detach(), "gradients": torch.autograd.grad(loss, leaves)}, truth)
        yield {}
        return
    step, leaves = _step(contender, case, inputs), inputs.leaves(case)
    for _ in range(WARM_UP_STEPS):
        step()
    yield {}
    for order in sys.stdin:
        for leaf in leaves:
            leaf.grad = None
        if order.strip() == "time":
            yield {"seconds": seconds_of(step, case.device)}
        elif order.strip() == "memory":
            yield {"peak_bytes": peak_bytes_of(step, case.device)}
        else:
            yield {} if contender == "floor" else _errors(step, leaves, truth, case.device)


def _start(contender: str, case: Case, truth: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    job = [contender, json.dumps(asdict(case)), str(truth)]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.features", "--serve", *job],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str], order: str = "") -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    if order:
        process.stdin.write(order + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a contender stopped with status {process.wait()}; its words are above")
    return json.loads(line)


def run_case(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round, peak bytes and errors, by contender."""
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.pt"
        first = _start("truth", case, truth)
        _answer(first)
        first.communicate()
        processes: dict[str, subprocess.Popen[str]] = {}
        try:
            for name in CONTENDERS:
                processes[name] = _start(name, case, truth)
                _answer(processes[name])
            found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in processes}
            for number in range(rounds):
                for name in sorted(processes, reverse=bool(number % 2)):
                    found[name]["seconds"].append(_answer(processes[name], "time")["seconds"])
            for name, process in processes.items():
                found[name] |= _answer(process, "memory") | _answer(process, "error")
        finally:
            for process in processes.values():
                process.communicate()
    return found


def _ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    pairs = zip(mine["seconds"], theirs["seconds"], strict=True)
    return statistics.median(ours / other for ours, other in pairs)


def markdown(case: Case, found: dict[str, dict[str, Any]]) -> str:
    """The table of one case."""
    lines = [
        case.name,
        "",
        "| | median ms | peak extra MiB | loss error | gradient error | x eager, time | x eager, memory | x floor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    eager, floor = found["eager"], found["floor"]
    for name, row in found.items():
        cells = [f"{1000 * statistics.median(row['seconds']):.1f}"]
        peak = row["peak_bytes"]
        cells.append("" if peak is None else f"{peak / 2**20:.1f}")
        cells += [f"{row[error]:.1e}" if error in row else "" for error in ("loss_error", "gradient_error")]
        cells.append(f"{_ratio(row, eager):.3f}")
        cells.append("" if peak is None else f"{peak / max(1, eager['peak_bytes']):.3f}")
        cells.append(f"{_ratio(row, floor):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure a suite and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each contender (default: %(default)s)"
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.serve:
        contender, case, truth = chosen.serve
        for answer in serve(contender, Case(**json.loads(case)), Path(truth)):
            print(json.dumps(answer), flush=True)
        return 0
    cases = SUITES[chosen.suite]
    if cases[0].device == "cuda" and not torch.cuda.is_available():
        print(
            f"Suite '{chosen.suite}' needs a CUDA or ROCm GPU, and torch finds none; try --suite cpu.",
            file=sys.stderr,
        )
        return 2
    print(", ".join(f"{name} {value}" for name, value in environment(cases[0].device).items()))
    for case in cases:
        print(f"\n{markdown(case, run_case(case, chosen.rounds))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
