"""`python -m benchmarks.contextual`: contextual_relation_loss beside the eager formula of the study it replaces.

Loss and gradient of the student's features, no mask. Protocol as in benchmarks/README.md: a process for each contender,
rounds in which each takes one turn, ratios within a round, and the error of both against float64.
"""

import argparse
import json
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
    """Features (batch, layers, length, width) of a student and a teacher."""

    batch: int
    layers: int
    length: int
    width: int
    teacher_width: int
    window: int = 10
    layer_weight: float = 0.0
    device: str = "cpu"

    @property
    def name(self) -> str:
        layers = f", layer-transforming relation x {self.layer_weight:g}" if self.layer_weight else ""
        return (
            f"contextual_relation_loss, B={self.batch}, L={self.layers}, N={self.length}, D_s={self.width}, "
            f"D_t={self.teacher_width}, window {self.window}, float32{layers}"
        )


SUITES = {
    "cpu": (Case(8, 3, 256, 256, 512), Case(8, 3, 256, 256, 512, layer_weight=1.0)),
    # The study's own batch.
    "gpu": (Case(16, 7, 512, 384, 768, device="cuda"),),
    "smoke": (Case(2, 2, 64, 32, 48, window=4, layer_weight=1.0),),
}


def make_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Student and teacher features of one latent meaning a token; neighbours share half of it, layers differ by noise."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    meaning = normal(case.batch, 1, case.length, 32)
    meaning = meaning + meaning.roll(1, 2)

    def features(width: int, noise: float) -> Tensor:
        return meaning @ normal(32, width) / 8.0 + noise * normal(case.batch, case.layers, case.length, width)

    return features(case.width, 0.7).requires_grad_(), features(case.teacher_width, 0.5)


def _around(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(length, device=device)
    if window >= length:
        return positions.expand(length, length), torch.ones((), dtype=torch.bool, device=device)
    index = positions[:, None] + torch.arange(-window, window + 1, device=device)
    return index.clamp(0, length - 1), ((index >= 0) & (index < length)).unsqueeze(-1)


def eager_relations(student: Tensor, teacher: Tensor, window: int) -> Tensor:
    """The study's two terms on one axis as plain PyTorch: every neighbour's vector gathered, compared, normalised."""
    index, inside = _around(student.shape[2], window, student.device)

    def distance(side: Tensor) -> Tensor:
        side = F.normalize(side, dim=-1)
        return 1.0 - (side[:, :, :, None] * side[:, :, index] * inside).sum(-1)

    def angle(side: Tensor) -> Tensor:
        steps = F.normalize((side[:, :, :, None] - side[:, :, index]) * inside, dim=-1)
        return torch.einsum("blnvd,blnwd->blnvw", steps, steps)

    return F.mse_loss(distance(student), distance(teacher)) + F.mse_loss(angle(student), angle(teacher))


def eager(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    """The eager loss."""
    loss = eager_relations(student, teacher, case.window)
    if case.layer_weight:
        transposed = (student.transpose(1, 2), teacher.transpose(1, 2))
        loss = loss + case.layer_weight * eager_relations(*transposed, case.window)
    return loss


def ours(case: Case, student: Tensor, teacher: Tensor, impl: Any = None) -> Tensor:
    """The library's loss as it comes: triton on a GPU, torch on a CPU."""
    from kdkernels import contextual_relation_loss

    return contextual_relation_loss(
        student, teacher, window=case.window, layer_weight=case.layer_weight, impl=impl
    )


CONTENDERS: dict[str, Callable[[Case, Tensor, Tensor], Tensor]] = {"ours": ours, "eager": eager}


def serve(contender: str, case: Case, truth: Path) -> Iterator[dict[str, Any]]:
    """One contender in its process: an answer for every order on stdin; "truth" writes a file and ends."""
    student, teacher = make_inputs(case)
    if contender == "truth":
        exact = student.detach().double().requires_grad_()
        loss = ours(case, exact, teacher.double(), impl="torch")
        loss.backward()
        torch.save({"loss": loss.detach(), "gradient": exact.grad}, truth)
        yield {}
        return

    def step() -> Tensor:
        student.grad = None
        loss = CONTENDERS[contender](case, student, teacher)
        loss.backward()
        return loss.detach()

    for _ in range(WARM_UP_STEPS):
        step()
    yield {}
    for order in sys.stdin:
        student.grad = None
        if order.strip() == "time":
            yield {"seconds": seconds_of(step, case.device)}
        elif order.strip() == "memory":
            yield {"peak_bytes": peak_bytes_of(step, case.device)}
        else:
            exact = torch.load(truth, weights_only=True, map_location=case.device)
            loss = step().double()
            assert student.grad is not None
            gradient = (student.grad.double() - exact["gradient"]).norm() / exact["gradient"].norm()
            yield {
                "loss_error": ((loss - exact["loss"]).abs() / exact["loss"]).item(),
                "gradient_error": gradient.item(),
            }


def _start(contender: str, case: Case, truth: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    job = [contender, json.dumps(asdict(case)), str(truth)]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.contextual", "--serve", *job],
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
        processes = {name: _start(name, case, truth) for name in CONTENDERS}
        try:
            found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in processes}
            for process in processes.values():
                _answer(process)
            for number in range(rounds):
                for name in sorted(processes, reverse=bool(number % 2)):
                    found[name]["seconds"].append(_answer(processes[name], "time")["seconds"])
            for name, process in processes.items():
                found[name] |= _answer(process, "memory") | _answer(process, "error")
        finally:
            for process in processes.values():
                process.communicate()
    return found


def markdown(case: Case, found: dict[str, dict[str, Any]]) -> str:
    """The table of one case."""
    student = 4 * case.batch * case.layers * case.length * case.width
    lines = [
        f"{case.name} (student features {student / 2**20:.0f} MiB)",
        "",
        "| | median s | peak extra MiB | loss error | gradient error | x eager, time | x eager, memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = found["eager"]
    for name, row in found.items():
        ratio = statistics.median(
            mine / theirs for mine, theirs in zip(row["seconds"], base["seconds"], strict=True)
        )
        memory, share = "", ""
        if row["peak_bytes"] is not None:
            memory, share = (
                f"{row['peak_bytes'] / 2**20:.1f}",
                f"{row['peak_bytes'] / max(1, base['peak_bytes']):.3f}",
            )
        lines.append(
            f"| {name} | {statistics.median(row['seconds']):.3f} | {memory} | {row['loss_error']:.1e} "
            f"| {row['gradient_error']:.1e} | {ratio:.3f} | {share} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure a suite and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contextual", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)"
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
