"""Random calls of every loss against float64: `python -m benchmarks.fuzz --minutes 15`.

Case n is drawn from the seed n: its function, shapes, dtype, form of the teacher, divergence and options. The truth is the
reference in float64; the bounds are those of the tests, from the rounding that the formula has to expect
(`tests/support/budget.py`). A failure is shrunk to the simplest call that still fails, and printed as a line that repeats it.
"""

import argparse
import dataclasses
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import kdkernels
from tests.support import rounding
from tests.support.budget import error_over_bound
from tests.support.rounding import truths

DIVERGENCES = (
    "ForwardKL()", "ReverseKL()", "JSD(0.5)", "JSD(0.1)", "SkewKL(0.1)", "SkewReverseKL(0.1)", "TVD()", "AlphaBeta(0.2, 0.7)",
    "AlphaBeta(0.5, 0.5)", "ChiSquared()", "Renyi(0.5)", "Renyi(2.0)", "Decoupled(1.0, 4.0)",
)  # fmt: skip
FUNCTIONS = ("kd_loss", "linear_kd_loss", "projection_mse", "cosine_loss", "relation_kl")
CONFIRMING_RUNS = 64
"""A failure counts when it remains with bounds from this many runs: eight tell a deviation to a quarter only."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. The defaults are the simplest values, towards which failures are shrunk."""

    seed: int = 0
    function: str = "kd_loss"
    impl: str = "torch"
    dtype: str = "float32"
    rows: int = 1
    vocabulary: int = 2
    width: int = 1
    teacher_width: int = 1
    spread: float = 1.0
    near: float = 0.0
    ignored: float = 0.0
    weighted: bool = False
    teacher: str = "logits"
    entries: int = 1
    divergence: str = "ForwardKL()"
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    t_squared: bool = True
    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    shared: int = 0
    """Teacher entries beyond the student's vocabulary, with vocab_map="shared_prefix"."""
    mode: str = "fast"
    chunk_bytes: int | None = None
    static_shapes: bool = False
    project: str = "student"
    normalize: bool = False
    causal: bool = False

    def __str__(self) -> str:
        defaults = Case()
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(defaults, field.name)
        ]
        return f"Case({', '.join(given)})"


def draw(number: int) -> Case:
    """The case of this number."""
    pick = random.Random(number)
    function = pick.choices(FUNCTIONS, (4, 4, 1, 1, 1))[0]
    common = {
        "seed": number,
        "function": function,
        "dtype": pick.choice(("float32", "float32", "bfloat16", "float16")),
        "rows": pick.choice((1, 2, 3, 5, 8, 17)),
        "width": pick.choice((1, 2, 3, 8, 33)),
        "teacher_width": pick.choice((1, 2, 5, 16, 31)),
        "spread": pick.choice((1e-3, 0.3, 1.0, 4.0)),
        "near": pick.choice((0.0, 0.0, 0.9, 0.999, 1.0)),
        "ignored": pick.choice((0.0, 0.0, 0.4, 1.0)),
        "reduction": pick.choice(("mean", "sum", "none")),
    }
    if function == "relation_kl":
        return Case(**{**common, "causal": pick.random() < 0.5})
    if function in ("projection_mse", "cosine_loss"):
        normalize = function == "projection_mse" and pick.random() < 0.3
        return Case(**common, project=pick.choice(("student", "teacher")), normalize=normalize)
    teacher = pick.choice(("logits", "renormalize", "bucket"))
    if function == "linear_kd_loss":
        teacher = pick.choice(("head", "head", teacher))
    divergence = pick.choice(DIVERGENCES)
    full = teacher in ("logits", "head")
    if not full and divergence.startswith("Decoupled"):
        divergence = "ForwardKL()"
    if teacher == "renormalize" and divergence in ("ReverseKL()", "AlphaBeta(0.2, 0.7)", "Renyi(2.0)"):
        divergence = "JSD(0.5)"
    vocabulary = pick.choice((1, 2, 3, 7, 16, 63, 64, 65, 130))
    plain = {"mode": "fast", "chunk_bytes": None, "static_shapes": False}
    if function == "linear_kd_loss":
        low = full and not divergence.startswith("Renyi") and pick.random() < 0.3
        plain = {
            "mode": "low_memory" if low else "fast",
            "chunk_bytes": pick.choice((None, 8 * 256, 16 * 256)),
            "static_shapes": pick.random() < 0.3,
        }
    return Case(
        **common,
        **plain,
        vocabulary=vocabulary,
        weighted=pick.random() < 0.3,
        teacher=teacher,
        entries=pick.randint(1, vocabulary),
        divergence=divergence,
        temperature=pick.choice((0.5, 1.0, 1.0, 2.0, 4.0)),
        kd_weight=pick.choice((1.0, 1.0, 0.3, 0.0)),
        ce_weight=pick.choice((0.0, 0.5, 1.0)),
        label_smoothing=pick.choice((0.0, 0.0, 0.1)),
        t_squared=pick.random() < 0.7,
        softcap=pick.choice((None, None, 5.0, 30.0)),
        logit_scale=pick.choice((1.0, 1.0, 0.25, 2.0)),
        shared=pick.choice((0, 0, 3)) if full and plain["mode"] == "fast" else 0,
    )


def call_of(case: Case) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """The tensors that get a gradient, and the call as a function of them and of the back end.

    All tensors hold numbers of the case's dtype; the call takes them in any dtype that holds those.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    valid = torch.rand(case.rows, generator=generator) >= case.ignored
    if case.function in ("kd_loss", "linear_kd_loss"):
        return _logit_call(case, normal, valid, generator)
    heads = 1 if case.function == "relation_kl" else 0
    student = normal(1, case.rows, case.width, scale=case.spread)
    teacher = normal(1, case.rows, case.teacher_width, scale=case.spread)
    mask = valid.unsqueeze(0)
    function = getattr(kdkernels, case.function)
    options: dict[str, Any] = {"reduction": case.reduction, "mask": mask}
    if heads:
        options.update(heads=heads, causal=case.causal)
        return [student], lambda inputs, impl: function(
            inputs[0], teacher.to(inputs[0].dtype), impl=impl, **options
        )
    shape = (
        (case.teacher_width, case.width) if case.project == "student" else (case.width, case.teacher_width)
    )
    weight = normal(*shape)
    options["project"] = case.project
    if case.function == "projection_mse":
        options["normalize"] = case.normalize
    return [student, weight], lambda inputs, impl: function(
        inputs[0], teacher.to(inputs[0].dtype), inputs[1], impl=impl, **options
    )


def _logit_call(
    case: Case, normal: Callable[..., Tensor], valid: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], Callable[..., Tensor]]:
    labels = torch.randint(case.vocabulary, (case.rows,), generator=generator).where(
        valid, torch.tensor(-100)
    )
    options: dict[str, Any] = {
        "divergence": eval(case.divergence, dict(vars(kdkernels))),
        "vocab_map": "shared_prefix" if case.shared else None,
    }
    for name in (
        "temperature", "kd_weight", "ce_weight", "label_smoothing", "t_squared", "reduction", "softcap", "logit_scale",
    ):  # fmt: skip
        options[name] = getattr(case, name)
    if case.weighted:
        options["token_weight"] = torch.rand(case.rows, generator=generator)
    entries = case.vocabulary + case.shared
    if case.function == "kd_loss":
        teacher = normal(case.rows, entries, scale=case.spread)
        noise = normal(case.rows, case.vocabulary, scale=case.spread)
        student = (case.near * teacher[:, : case.vocabulary] + (1 - case.near) * noise).to(teacher.dtype)
        return [student], lambda inputs, impl: kdkernels.kd_loss(
            inputs[0], _teacher(case, [teacher], inputs[0].dtype), labels, impl=impl, **options
        )
    hidden = normal(case.rows, case.width, scale=case.spread)
    head = normal(case.vocabulary, case.width)
    if case.teacher == "head":
        sides = [
            normal(case.rows, case.teacher_width, scale=case.spread),
            normal(entries, case.teacher_width),
        ]
    else:
        sides = [normal(case.rows, entries, scale=case.spread)]
    options.update(mode=case.mode, chunk_bytes=case.chunk_bytes, static_shapes=case.static_shapes)
    fast = {"mode": "fast", "chunk_bytes": None}
    return [hidden, head], lambda inputs, impl: kdkernels.linear_kd_loss(
        inputs[0],
        inputs[1],
        _teacher(case, sides, inputs[0].dtype),
        labels,
        impl=impl,
        **{**options, **(fast if impl == "reference" else {})},
    )


def _teacher(case: Case, sides: list[Tensor], dtype: torch.dtype) -> kdkernels.Teacher:
    if case.teacher == "head":
        return kdkernels.TeacherHead(sides[0].to(dtype), sides[1].to(dtype))
    if case.teacher == "logits":
        return sides[0].to(dtype)
    logprobs, ids = sides[0].float().log_softmax(-1).topk(case.entries)
    tail = "bucket" if case.teacher == "bucket" else "renormalize"
    return kdkernels.TeacherTopK(logprobs.to(torch.promote_types(dtype, torch.float32)), ids, tail)


def results(inputs: list[Tensor], call: Callable[..., Tensor], impl: str) -> tuple[Tensor, ...]:
    """Value and gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss = call(inputs, impl)
    factors = [0.5 + number / loss.numel() for number in range(loss.numel())]
    upstream = torch.tensor(factors, dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, inputs, upstream)


class Refused(Exception):
    """The call raised a sentence of its own, before any work."""


def check(case: Case) -> str | None:
    """A sentence when a result is outside of its bound, None when all are right.

    Raises:
        Refused: the call is refused.
    """
    inputs, call = call_of(case)
    try:
        found = results(inputs, call, case.impl)
    except (ValueError, NotImplementedError) as error:
        raise Refused(str(error)) from error
    exact = [tensor.double() for tensor in inputs]
    names = ("loss", *(f"gradient {number}" for number in range(len(inputs))))
    for name, ours, truth in zip(
        names, found, truths(lambda: results(exact, call, "reference")), strict=True
    ):
        finite = truth.value.isfinite()
        if not torch.equal(ours.isfinite(), finite):
            return f"{name} is {ours.flatten()[:4].tolist()}, and {truth.value.flatten()[:4].tolist()} in float64"
        if case.divergence == "TVD()" and name != "loss":
            continue  # where both sides nearly agree, the sign of their difference is a matter of rounding
        if finite.any():
            compared = rounding.Truth(truth.value[finite], truth.spread[finite])
            for what, ratio in error_over_bound(ours[finite], compared).items():
                if not ratio <= 1.0:
                    return f"{name}: the {what} error is {ratio:.3g} times its bound"
    return None


def fails(case: Case) -> str | None:
    """As `check`, with bounds from more runs where the usual ones are broken; any other exception is a failure.

    Raises:
        Refused: the call is refused.
    """
    try:
        if check(case) is None:
            return None
        usual, rounding.RUNS = rounding.RUNS, CONFIRMING_RUNS
        rounding._spreads.clear()
        try:
            return check(case)
        finally:
            rounding.RUNS = usual
            rounding._spreads.clear()
    except Refused:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one field simpler: its default, or half of a number on the way there."""
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if field.name == "seed" or value == field.default:
            continue
        yield dataclasses.replace(case, **{field.name: field.default})
        if type(value) is int and value // 2 > 1:
            yield dataclasses.replace(case, **{field.name: value // 2})


def shrunk(case: Case) -> Case:
    """The simplest case on the way to the defaults that still fails."""
    while True:
        smaller = next((one for one in simpler(case) if _still_fails(one)), None)
        if smaller is None:
            return case
        case = smaller


def _still_fails(case: Case) -> bool:
    try:
        return fails(case) is not None
    except Refused:
        return False


def main(words: Sequence[str] | None = None) -> int:
    """Run cases until the time is over; 1 when one failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fuzz", description="Random calls of every loss against float64."
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="how long (default 15)")
    parser.add_argument("--start", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--cases", type=int, help="stop after this many cases")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = said = time.monotonic()
    refused: Counter[str] = Counter()
    done = failed = 0
    first_memory = 0
    for number in range(options.start, sys.maxsize):
        case = draw(number)
        sentence = None
        try:
            sentence = fails(case)
        except Refused as error:
            refused[str(error)[:60]] += 1
        if sentence:
            failed += 1
            smallest = shrunk(case)
            print(f"case {number}: {sentence}\n    check({smallest})  # {fails(smallest)}", flush=True)
        done += 1
        now = time.monotonic()
        if done == 1000:
            first_memory = memory()
        if now - said > 30:
            said = now
            print(f"{done:,} cases, {failed} failed, {memory():,} MiB", file=sys.stderr, flush=True)
        if now - began > 60 * options.minutes or done == options.cases:
            break
    print(
        f"{done:,} cases in {(time.monotonic() - began) / 60:.1f} min: {failed} failed, {sum(refused.values()):,} refused; peak memory "
        f"{first_memory:,} MiB after 1,000 cases, {memory():,} MiB at the end"
    )
    for sentence, count in refused.most_common(5):
        print(f"    refused {count:,} times: {sentence}")
    return 1 if failed else 0


def memory() -> int:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    raise SystemExit(main())
