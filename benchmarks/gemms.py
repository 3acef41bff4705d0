"""The four GEMMs of a chunk alone: time and error, and the gradient of the hidden states with half-precision sums beside it.

`python -m benchmarks.gemms --out FOLDER`. A chunk of the reference shape, bfloat16, on a GPU; `--device cpu` with a small
`--shape` shows that it runs. The gradient of the logits is that of a student near its teacher, of which the parts cancel.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import environment
from benchmarks.rows import write
from kdkernels.core.matmul import add_weight_gradient, head_logits, hidden_gradient

# Rows, student's and teacher's width, vocabulary.
SHAPE = (4096, 2048, 4096, 128256)
SAMPLE = 64  # rows that are multiplied in float64


def seconds(step: Callable[[], object], device: str) -> float:
    """Median time of a step."""
    if device == "cuda":
        from benchmarks.rows import milliseconds

        return milliseconds(step) / 1e3
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[1]


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the truth."""
    return float((found.double() - exact).norm() / exact.norm())


def measure(shape: tuple[int, int, int, int], device: str) -> Iterator[dict[str, object]]:
    """One record a GEMM: its time, its rate, and its error against float64 of the same half-precision factors."""
    rows, width, teacher_width, vocabulary = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).bfloat16()

    hidden, head = normal(rows, width, scale=1.0), normal(vocabulary, width, scale=width**-0.5)
    teacher, teacher_head = (
        normal(rows, teacher_width, scale=1.0),
        normal(vocabulary, teacher_width, scale=teacher_width**-0.5),
    )
    logits = torch.empty(rows, vocabulary, device=device)
    sample = slice(0, min(SAMPLE, rows))

    def record(
        name: str, step: Callable[[], object], size: int, found: Callable[[], float]
    ) -> dict[str, object]:
        step()
        taken, wrong = seconds(step, device), found()
        rate = 2 * rows * vocabulary * size / taken / 1e12
        return {"gemm": name, "ms": round(taken * 1e3, 4), "tflops": round(rate, 2), "error": f"{wrong:.3e}"}

    def of_logits(given: Tensor, weight: Tensor) -> Callable[[], float]:
        return lambda: error(logits[sample], given[sample].double() @ weight.double().t())

    for name, given, weight in (("teacher logits", teacher, teacher_head), ("student logits", hidden, head)):
        yield record(
            name,
            lambda given=given, weight=weight: head_logits(given, weight, logits),
            given.shape[1],
            of_logits(given, weight),
        )
    # Softmax of the student less that of a teacher a hundredth of a logit away: sums to 0 in every row.
    grad = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device)
    for start in range(0, rows, SAMPLE):
        part = logits[start : start + SAMPLE]
        noise = torch.randn(part.shape, generator=generator, device=device) * 0.01
        grad[start : start + SAMPLE] = part.softmax(-1) - (part + noise).softmax(-1)
    exact = grad[sample].double() @ head.double()
    d_hidden = torch.empty(rows, width, device=device)
    yield record(
        "hidden gradient, float32 sums",
        lambda: hidden_gradient(grad, head, d_hidden),
        width,
        lambda: error(d_hidden[sample].bfloat16(), exact),
    )
    half = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    yield record(
        "hidden gradient, written in bfloat16",
        lambda: torch.mm(grad, head, out=half),
        width,
        lambda: error(half[sample], exact),
    )
    d_head = torch.zeros(vocabulary, width, device=device)
    for name, first in (("head gradient, written", True), ("head gradient, added", False)):

        def wrong() -> float:
            add_weight_gradient(d_head, grad, hidden, first=True)
            return error(d_head[sample], grad[:, sample].double().t() @ hidden.double())

        yield record(
            name, lambda first=first: add_weight_gradient(d_head, grad, hidden, first=first), width, wrong
        )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write `<date>-gemms.csv` anew after every record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemms", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write <date>-gemms.csv there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        default=SHAPE,
        metavar=("ROWS", "WIDTH", "TEACHER_WIDTH", "VOCABULARY"),
    )
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gemms times a GPU, and torch finds none; pass --device cpu and a small --shape.",
            file=sys.stderr,
        )
        return 2
    stamp = environment(chosen.device)
    print(", ".join(f"{name} {value}" for name, value in stamp.items()))
    path = chosen.out / f"{stamp['date']}-gemms.csv" if chosen.out else None
    sizes = dict(zip(("rows", "width", "teacher_width", "vocabulary"), chosen.shape, strict=True))
    kept = {name: stamp[name] for name in ("device", "torch", "commit", "date")}
    records: list[dict[str, object]] = []
    for record in measure(tuple(chosen.shape), chosen.device):
        print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
        records.append({**record, **sizes, **kept})
        if path:
            write(path, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
