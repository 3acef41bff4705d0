"""Memory of a training step at a large vocabulary, with the fused losses and with eager ones: `python -m benchmarks.peaks`.

Two measurements of each, every one in a process of its own: whole steps of benchmarks.language_steps (models, optimizer,
activations, loss), and the loss alone from hidden states to the gradients of both student tensors (what it holds above them).
"""

import argparse
import json
import sys
from dataclasses import replace

from benchmarks import cases, language_steps, linear_kd
from benchmarks.batches import CONTENDERS, in_own_process, peak_of
from benchmarks.measure import environment, peak_bytes_of, resident_bytes

CASE = language_steps.Case(
    rows=8, vocabulary=152064, width=128, layers=4, teacher_width=256, teacher_layers=6
)
"""Qwen2.5-Coder's vocabulary above small models, so that the step of eager losses fits into 16 GiB."""
PARTS = {"step": "whole training steps", "loss": "the loss alone"}


def loss_case(case: language_steps.Case) -> cases.Case:
    """The loss of such a step, on its own."""
    return cases.Case("forward_kl", case.rows * case.length, case.width, case.teacher_width, case.vocabulary)


def loss_peak(contender: str, case: language_steps.Case) -> int | None:
    """Bytes that a first forward and backward hold above hidden states and heads; the gradients count."""
    alone = loss_case(case)
    inputs = cases.make_inputs(alone)
    name = "ours" if contender == "kd" else contender
    return peak_bytes_of(linear_kd.OPERATION.contenders[name](alone, inputs), alone.device)


def measured(part: str, contender: str, case: language_steps.Case) -> int | None:
    """The peak of one part, behind a tiny one: imports and thread pools are no part of it."""
    peak = {"step": peak_of, "loss": loss_peak}[part]
    peak(contender, language_steps.SMOKE[0])
    return peak(contender, case)


def main(arguments: list[str] | None = None) -> int:
    """Print a table: what a step and its loss hold, fused and eager, and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peaks", description=__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        default=CASE.rows,
        help=f"rows of {CASE.length} tokens in the step (default: %(default)s)",
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    case = replace(CASE, rows=chosen.rows)
    if chosen.one:
        part, contender = chosen.one
        print(json.dumps(measured(part, contender, case)))
        return 0
    if resident_bytes() is None:
        print("benchmarks.peaks reads memory from /proc, and this system has none.", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(f"\n{case.name}\n\n| | fused MiB | eager MiB | fused / eager |\n|---|---:|---:|---:|")
    for part, label in PARTS.items():
        fused, eager = (
            in_own_process("benchmarks.peaks", "--rows", str(case.rows), "--one", part, contender)
            for contender in CONTENDERS
        )
        print(f"| {label} | {fused / 2**20:.0f} | {eager / 2**20:.0f} | {fused / eager:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
