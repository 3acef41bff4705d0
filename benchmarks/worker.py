"""One contender in a process of its own, taking orders on stdin: warm up, time one step, measure memory, show error.

Run by benchmarks.runner as `python -m benchmarks.worker '{"contender": .., "family": .., "case": {..}, "truth": "file"}'`.
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_bytes_of, seconds_of
from benchmarks.operation import CannotRun, Operation, Step
from benchmarks.registry import OPERATIONS

WARM_UP_STEPS = 2
# A turn lasts this long where steps are shorter, and counts with the median of its steps: the first of 30 ms after
# other processes' turns shows mostly that the machine changed hands.
TURN_SECONDS = 0.25


def relative_error(actual: Tensor | None, truth: Tensor) -> float:
    """Euclidean norm of the difference over that of the truth."""
    if actual is None:
        raise CannotRun("a gradient is missing")
    return ((actual.double() - truth).norm() / truth.norm()).item()


def errors(step: Step, leaves: Mapping[str, Tensor], truth_path: Path, device: str) -> dict[str, float]:
    """Relative errors of the loss and of the gradient of every leaf against fp64."""
    truth = torch.load(truth_path, weights_only=True, map_location=device)
    found = {"loss_error": relative_error(step(), truth["loss"])}
    for name, leaf in leaves.items():
        found[f"{name}_grad_error"] = relative_error(leaf.grad, truth[name])
    return found


def serve(job: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer every order until stdin closes."""
    operation: Operation = OPERATIONS[job["family"]]
    case, truth_path, contender = operation.case(**job["case"]), Path(job["truth"]), job["contender"]
    inputs = operation.make_inputs(case)
    give_back(case.device)
    if contender == "truth":
        assert operation.truth is not None
        torch.save(operation.truth(case, inputs), truth_path)
        answer({"ready": True})
        return
    step, leaves = operation.contenders[contender](case, inputs), operation.leaves(case, inputs)

    def clear_gradients() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def fresh_step() -> None:
        clear_gradients()
        step()

    answer({"ready": True})
    for order in map(str.strip, sys.stdin):
        if order == "time" and case.device == "cuda":
            fresh_step()  # its memory went back to the others after the last order
        clear_gradients()
        found: dict[str, Any] = {}
        if order == "warm up":
            for _ in range(WARM_UP_STEPS):
                fresh_step()
        elif order == "time":
            end, seconds = time.monotonic() + TURN_SECONDS, []
            while not seconds or time.monotonic() < end:
                clear_gradients()
                seconds.append(seconds_of(step, case.device))
            found = {"seconds": statistics.median(seconds)}
        elif order == "memory":
            found = {"peak_bytes": peak_bytes_of(step, case.device)}
        elif contender not in operation.yardsticks:
            found = errors(step, leaves, truth_path, case.device)
        # Before the answer, with which the next contender's turn begins.
        clear_gradients()
        give_back(case.device)
        answer(found)


def give_back(device: str) -> None:
    """Free memory that the allocator keeps, which the other contenders need: they share the device."""
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Serve one job; whatever stops it becomes an answer with the reason."""
    # Answers go to the real stdout; what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # a peer's deprecations are no finding of this table

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        serve(json.loads(sys.argv[1]), answer)
    except CannotRun as reason:
        answer({"cannot_run": str(reason)})
    except Exception as error:  # a peer may fail in any way; the table shows how
        first_line = str(error).strip().partition("\n")[0]
        answer({"cannot_run": f"{type(error).__name__}: {first_line}"[:200]})


if __name__ == "__main__":
    main()
