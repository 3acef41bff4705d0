"""The row kernels alone on a GPU: bandwidth of every divergence and launch configuration, beside that of a copy.

`python -m benchmarks.rows --out FOLDER`. One chunk of the reference shape (1024 rows of 128,256 logits).
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.measure import environment
from kdkernels import JSD, TVD, ForwardKL, ReverseKL, SkewKL
from kdkernels.divergences import Divergence
from kdkernels.options import RowTerms

ROWS, VOCABULARY = 1024, 128256
DIVERGENCES: tuple[Divergence, ...] = (ForwardKL(), ReverseKL(), JSD(), SkewKL(), TVD())
# What the kernels use comes first: a run that is cut, as each record takes a compilation, keeps that.
CONFIGURATIONS = (
    (2048, 8),
    (2048, 4),
    (4096, 8),
    (4096, 16),
    (8192, 16),
)  # columns of a tile, warps of a program
LOGIT_DTYPES = (torch.float32, torch.bfloat16)
MIXTURES = (JSD, SkewKL, TVD)  # these read both rows three times, the others twice


def milliseconds(step: Callable[[], object]) -> float:
    """Median time of a step on the GPU, its caches emptied before each."""
    from triton.testing import do_bench

    found = do_bench(step, return_mode="median")
    assert isinstance(found, float)
    return found


def measure() -> Iterator[dict[str, object]]:
    """One record a configuration, dtype of the logits and divergence; the gradient is bfloat16 in every one."""
    from kdkernels._triton.kd.rows import kd_rows
    from kdkernels._triton.launch import RowConfig

    generator = torch.Generator("cuda").manual_seed(0)
    teacher32 = torch.randn(ROWS, VOCABULARY, device="cuda", generator=generator) * 3.0
    student32 = teacher32 + torch.randn(ROWS, VOCABULARY, device="cuda", generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS,), device="cuda", generator=generator)
    weight = torch.ones(ROWS, device="cuda")
    grad = torch.empty_like(student32, dtype=torch.bfloat16)
    target = torch.empty_like(student32)
    copy_ms = milliseconds(lambda: target.copy_(student32))
    copy_bandwidth = 8 * student32.numel() / copy_ms / 1e9
    sides = {dtype: (student32.to(dtype), teacher32.to(dtype)) for dtype in LOGIT_DTYPES}
    for block, warps in CONFIGURATIONS:
        config = RowConfig(block, 8, warps)
        for dtype, (student, teacher) in sides.items():
            for divergence in DIVERGENCES:
                passes = 3 if isinstance(divergence, MIXTURES) else 2
                moved = student.numel() * (passes * 2 * student.element_size() + grad.element_size())
                terms = RowTerms(divergence, 2.0, ce_weight=0.5)

                def launch(
                    student: torch.Tensor = student,
                    teacher: torch.Tensor = teacher,
                    terms: RowTerms = terms,
                    config: RowConfig = config,
                ) -> object:
                    return kd_rows(
                        student, teacher, labels, terms, row_weight=weight, grad=grad, config=config
                    )

                ms = milliseconds(launch)
                yield {
                    "divergence": repr(divergence),
                    "logits": str(dtype).removeprefix("torch."),
                    "block": block,
                    "warps": warps,
                    "ms": round(ms, 4),
                    "terabytes_per_second": round(moved / ms / 1e9, 3),
                    "share_of_copy": round(moved / ms / 1e9 / copy_bandwidth, 3),
                }


def write(path: Path, records: list[dict[str, object]]) -> None:
    """The file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write `<date>-rows.csv` anew after every record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write <date>-rows.csv there")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.rows times GPU kernels, and torch finds no CUDA or ROCm GPU.", file=sys.stderr)
        return 2
    stamp = environment("cuda")
    print(", ".join(f"{name} {value}" for name, value in stamp.items()))
    path = chosen.out / f"{stamp['date']}-rows.csv" if chosen.out else None
    records: list[dict[str, object]] = []
    for record in measure():
        print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
        records.append({**record, "device": stamp["device"], "commit": stamp["commit"]})
        if path:
            write(path, records)
    if path:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
