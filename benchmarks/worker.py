"""One contender in a process of its own, taking orders on stdin: warm up, time one step, measure memory, show error.

Run by benchmarks.runner as `python -m benchmarks.worker '{"contender": .., "case": {..}, "truth": "file"}'`.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import losses
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.contenders import CONTENDERS, YARDSTICKS, CannotRun, Step
from benchmarks.measure import peak_bytes_of, seconds_of

WARM_UP_STEPS = 2
TRUTH_ROWS = 64  # rows of fp64 logits held at a time


def write_truth(case: Case, inputs: Inputs, path: Path) -> None:
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
    truth = {"loss": total / count}
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        if leaf.grad is not None:
            truth[name] = leaf.grad / count
    torch.save(truth, path)


def relative_error(actual: Tensor | None, truth: Tensor) -> float:
    """Euclidean norm of the difference over that of the truth."""
    if actual is None:
        raise CannotRun("a gradient is missing")
    return ((actual.double() - truth).norm() / truth.norm()).item()


def errors(step: Step, inputs: Inputs, truth_path: Path) -> dict[str, float]:
    """Relative errors of the loss and of both gradients against fp64."""
    truth = torch.load(truth_path, weights_only=True, map_location=inputs.labels.device)
    inputs.clear_gradients()
    loss = step()
    found = {
        "loss_error": relative_error(loss, truth["loss"]),
        "hidden_error": relative_error(inputs.student_hidden.grad, truth["hidden"]),
    }
    if "weight" in truth:  # a frozen head has no gradient
        found["weight_error"] = relative_error(inputs.student_weight.grad, truth["weight"])
    return found


def serve(job: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer every order until stdin closes."""
    case, truth_path = Case(**job["case"]), Path(job["truth"])
    inputs = make_inputs(case)
    if job["contender"] == "truth":
        write_truth(case, inputs, truth_path)
        answer({"ready": True})
        return
    step = CONTENDERS[job["contender"]](case, inputs)

    def fresh_step() -> None:
        inputs.clear_gradients()
        step()

    answer({"ready": True})
    for order in sys.stdin:
        if order.strip() == "warm up":
            for _ in range(WARM_UP_STEPS):
                fresh_step()
            answer({})
        elif order.strip() == "time":
            if case.device == "cuda":  # its memory went back to the others after the last order
                fresh_step()
            inputs.clear_gradients()
            answer({"seconds": seconds_of(step, case.device)})
        elif order.strip() == "memory":
            inputs.clear_gradients()
            answer({"peak_bytes": peak_bytes_of(step, case.device)})
        elif order.strip() == "error":
            answer({} if job["contender"] in YARDSTICKS else errors(step, inputs, truth_path))
        if case.device == "cuda":
            inputs.clear_gradients()
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
