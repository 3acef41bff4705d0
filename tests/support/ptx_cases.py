"""Calls of the Triton back end that write a gradient over what it is the gradient of. `ptx_run.py` executes them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import Divergence
from kdkernels.core.row_state import Tile, new_state
from kdkernels.options import LogitTransform, RowTerms
from tests.support.ir_cases import DIVERGENCES

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles are of 2048 columns: three and a tail; two and a tail of one column, in rows that start anywhere; one and a tail;
# a tail alone, whose gradient lies over logits that other warps read at the same time.
LONG, ODD, SHORT, TAIL = 6224, 4097, 2128, 1008

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call. `call` takes a back end and the tensors, and returns what the back end wrote."""

    name: str
    make: Callable[[], Tensors]
    call: Callable[[Any, Tensors], Tensors]
    architecture: int = 90
    planted: Callable[[], AbstractContextManager[None]] = nullcontext


def written_over(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient goes: into the rows of `buffer`, as narrower numbers but for float64."""
    if buffer.dtype == torch.float64:
        return buffer
    return buffer.view(dtype)[:, : buffer.shape[1]]


def _normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return (torch.randn(shape) * 2.0).to(dtype)


def _logits(vocabulary: int, student: torch.dtype = FP32, teacher: int | None = None) -> Tensors:
    """A row, and one of weight 0 that holds NaN."""
    made = {
        "student": _normal(2, vocabulary, dtype=student),
        "teacher": _normal(2, vocabulary if teacher is None else teacher, dtype=student),
        "labels": torch.tensor([vocabulary - 3, 5]),
        "row_weight": torch.tensor([0.75, 0.0]),
        "decoupled": torch.tensor([[0.5, 1.0], [2.0, 1.0]]),
    }
    made["student"][1] = float("nan")
    return made


def _rows(
    backend: Any,
    tensors: Tensors,
    *,
    terms: RowTerms,
    grad: torch.dtype,
    prefix: int | None = None,
) -> Tensors:
    student = tensors["student"]
    options: dict[str, Any] = {
        name: tensors[name] for name in ("student_bias", "teacher_bias") if name in tensors
    }
    if type(terms.divergence).__name__ == "Decoupled":
        options["decoupled"] = (tensors["decoupled"][0], tensors["decoupled"][1])
    if prefix is not None or "map" in tensors:
        options["vocab_map"] = tensors.get("map", prefix)
    gradient = written_over(student, grad)
    kd, ce = backend.kd_rows(
        student,
        tensors["teacher"],
        tensors["labels"],
        terms,
        row_weight=tensors["row_weight"],
        grad=gradient,
        **options,
    )
    return {"divergence": kd, "cross entropy": ce, "gradient": gradient}


def _row_cases() -> Iterator[Case]:
    def case(
        words: str,
        make: Callable[[], Tensors],
        divergence: Divergence = DIVERGENCES["forward_kl"],
        grad: torch.dtype = BF16,
        **rest: Any,
    ) -> Case:
        own = {name: rest.pop(name) for name in ("prefix",) if name in rest}
        given: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5} | rest
        terms = RowTerms(divergence, **given)
        return Case(f"kd_rows {words}", make, partial(_rows, terms=terms, grad=grad, **own))

    over = "bfloat16 over float32"
    for number, (name, divergence) in enumerate(DIVERGENCES.items()):
        yield case(f"{name}, {over}", partial(_logits, LONG if number < 4 else SHORT), divergence)

    def biased() -> Tensors:
        biases = {"student_bias": _normal(ODD, dtype=BF16), "teacher_bias": _normal(ODD, dtype=BF16)}
        return _logits(ODD) | biases

    def mapped() -> Tensors:
        ids = torch.randperm(SHORT + 16)[:SHORT]
        ids[::7] = -1
        return _logits(SHORT, teacher=SHORT + 16) | {"map": ids}

    yield case(f"forward_kl, odd, biases, {over}", biased)
    yield case(f"forward_kl, less than a tile, {over}", partial(_logits, TAIL))
    yield case("forward_kl, float16 over float32", partial(_logits, LONG), grad=FP16)
    caps: dict[str, Any] = {
        side: LogitTransform(softcap=6.0) for side in ("student_transform", "teacher_transform")
    }
    yield case(f"jsd, softcaps, {over}", partial(_logits, SHORT), DIVERGENCES["jsd"], **caps)
    yield case(f"reverse_kl, smoothing, {over}", partial(_logits, SHORT), DIVERGENCES["reverse_kl"],
               label_smoothing=0.1)  # fmt: skip
    yield case(f"forward_kl, shared prefix, {over}", partial(_logits, LONG, FP32, 2064), prefix=2064)
    yield case(f"forward_kl, index map, {over}", mapped)
    yield case("forward_kl, float32 in place", partial(_logits, SHORT), grad=FP32)
    yield case("jsd, bfloat16 in place", partial(_logits, SHORT, BF16), DIVERGENCES["jsd"])


def _tile(backend: Any, tensors: Tensors, *, terms: RowTerms, has_teacher: bool = True) -> Tensors:
    student, teacher = tensors["student"], tensors["teacher"] if has_teacher else None
    state = new_state(len(student), student.dtype, student.device)
    tile = Tile(student, teacher, tensors["labels"], row_weight=tensors["row_weight"])
    backend.tile_statistics(tile, terms, state)
    if has_teacher:
        backend.tile_sums(tile, terms, state)
    gradient = written_over(student, BF16)
    backend.tile_gradient(tile, terms, state, vocabulary=student.shape[1], grad=gradient)
    return {"gradient": gradient}


def _softmax_gradient(backend: Any, tensors: Tensors) -> Tensors:
    logits = tensors["student"]
    gradient = written_over(logits, BF16)
    backend.softmax_gradient(
        logits,
        tensors["statistics"],
        tensors["factors"][0],
        tensors["factors"][1],
        tensors["factors"][2],
        temperature=2.0,
        grad=gradient,
    )
    return {"gradient": gradient}


def _features(backend: Any, tensors: Tensors, *, function: str, **options: Any) -> Tensors:
    prediction = tensors["prediction"]
    gradient = written_over(prediction, BF16)
    values = getattr(backend, function)(
        prediction,
        tensors["target"],
        bias=tensors["bias"],
        row_weight=tensors["weight"],
        grad=gradient,
        **options,
    )
    return {"values": values, "gradient": gradient}


def _other_cases() -> Iterator[Case]:
    over = "bfloat16 over float32"
    for name in ("forward_kl", "skew_kl"):
        terms = RowTerms(DIVERGENCES[name], temperature=2.0, ce_weight=0.5)
        yield Case(f"tile gradient {name}, {over}", partial(_logits, LONG), partial(_tile, terms=terms))
    terms = RowTerms(temperature=2.0, ce_weight=0.5)
    alone = partial(_tile, terms=terms, has_teacher=False)
    yield Case(f"tile gradient without a teacher, {over}", partial(_logits, LONG), alone)

    def sparse() -> Tensors:
        logits = _normal(2, LONG)
        largest = logits.amax(1)
        sums = [((logits - largest[:, None]) / heat).logsumexp(1) for heat in (2.0, 1.0)]
        return {
            "student": logits,
            "statistics": torch.stack([largest, *sums]),
            "factors": torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.25, 0.0]]),
        }

    yield Case(f"softmax_gradient {over}", sparse, _softmax_gradient)

    def features() -> Tensors:
        return {
            "prediction": _normal(2, LONG),
            "target": _normal(2, LONG, dtype=BF16),
            "bias": _normal(LONG, dtype=BF16),
            "weight": torch.tensor([0.5, 0.0]),
        }

    yield Case(f"mse_rows {over}", features, partial(_features, function="mse_rows"))
    for cosine in (False, True):
        words = "cosine" if cosine else "unit vectors"
        call = partial(_features, function="direction_rows", cosine=cosine)
        yield Case(f"direction_rows {words}, {over}", features, call)


@contextmanager
def _without_barrier() -> Iterator[None]:
    """The row kernel compiled as if its gradient had memory of its own: without the barrier before the store."""
    import kdkernels._triton

    rows: Any = sys.modules[kdkernels._triton.kd_rows.__module__]
    kept = rows.aliases_input
    rows.aliases_input = lambda written, read: False
    try:
        yield
    finally:
        rows.aliases_input = kept


def cases() -> list[Case]:
    """Everything on sm_90, a kernel of each kind on the others, and the row kernel without its barrier."""
    made = [*_row_cases(), *_other_cases()]
    some = (
        "kd_rows forward_kl, bfloat16 over",
        "kd_rows jsd, bfloat16 over",
        "tile gradient forward_kl",
        "mse_rows",
    )
    others = [
        replace(case, name=f"{case.name}, sm_{architecture}", architecture=architecture)
        for architecture in (80, 100)
        for case in made
        if case.name.startswith(some)
    ]
    planted = [
        replace(case, name=f"planted: no barrier, {case.name}", planted=_without_barrier)
        for case in made
        if case.name.startswith(("kd_rows forward_kl, bfloat16", "kd_rows forward_kl, less"))
    ]
    return [*(replace(case, name=f"{case.name}, sm_90") for case in made), *others, *planted]
