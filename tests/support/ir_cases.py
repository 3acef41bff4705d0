"""Calls of the public losses whose Triton launches are executed from their IR, instruction by instruction.

`tests/support/ir_run.py` runs them and says how.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    Divergence,
    ForwardKL,
    Impl,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherCrossTerm,
    TeacherHead,
    TeacherTopK,
)

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": JSD(0.3),
    "skew_kl": SkewKL(0.2),
    "skew_reverse_kl": SkewReverseKL(0.2),
    "tvd": TVD(),
    "alpha_beta": AlphaBeta(0.3, 0.6),
    "chi_squared": ChiSquared(),
    "renyi": Renyi(0.6),
    "decoupled": Decoupled(),
}

# One full tile of 2048 columns and a ragged tail; two full tiles and a tail; full tiles only; less than a tile.
RAGGED, LONG, ALIGNED, SHORT = 2075, 4123, 4096, 37

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call. `call` takes the tensors by name and `impl`, and returns the loss and what else is compared."""

    name: str
    make: Callable[[], Tensors]
    call: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[str, ...]  # names of tensors that get a gradient
    roundings: int = 1  # to half precision, on the way to a gradient


def _normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def _labels(rows: int, vocabulary: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (rows,))
    labels[1] = -100
    labels[-1] = vocabulary - 1
    return labels


def _logits(
    vocabulary: int,
    student: torch.dtype = FP32,
    teacher: torch.dtype | None = None,
    teacher_vocabulary: int | None = None,
) -> Tensors:
    width = vocabulary if teacher_vocabulary is None else teacher_vocabulary
    return {
        "student": _normal(3, vocabulary, scale=2.0, dtype=student),
        "teacher": _normal(3, width, scale=2.0, dtype=teacher or student),
        "labels": _labels(3, vocabulary),
    }


def _heads(
    vocabulary: int, dtype: torch.dtype, rows: int = 4, teacher_vocabulary: int | None = None
) -> Tensors:
    width = vocabulary if teacher_vocabulary is None else teacher_vocabulary
    return {
        "student": _normal(rows, 16, scale=0.5, dtype=dtype),
        "head": _normal(vocabulary, 16, dtype=dtype),
        "bias": _normal(vocabulary, dtype=dtype),
        "teacher": _normal(rows, 24, scale=0.4, dtype=dtype),
        "teacher_head": _normal(width, 24, dtype=dtype),
        "teacher_bias": _normal(width, dtype=dtype),
        "labels": _labels(rows, vocabulary),
    }


def _outcome(result: Any) -> tuple[Tensor, ...]:
    """The loss, and the statistics if there are any."""
    if isinstance(result, Tensor):
        return (result,)
    loss, stats = result
    return (loss, *(value for value in stats if value.is_floating_point()))


def _kd(tensors: Tensors, impl: Impl | None, **options: Any) -> tuple[Tensor, ...]:
    given: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5} | options
    given |= {name: tensors[name] for name in ("vocab_map", "token_weight") if name in tensors}
    return _outcome(
        kdkernels.kd_loss(tensors["student"], tensors["teacher"], tensors["labels"], impl=impl, **given)
    )


def _linear(
    tensors: Tensors, impl: Impl | None, *, biases: bool = True, softcap: float | None = None, **options: Any
) -> tuple[Tensor, ...]:
    teacher = TeacherHead(
        tensors["teacher"], tensors["teacher_head"], tensors["teacher_bias"] if biases else None, softcap
    )
    given: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5} | options
    if impl == "reference":  # which has one schedule only
        given = {name: value for name, value in given.items() if name not in ("mode", "chunk_bytes")}
    return _outcome(
        kdkernels.linear_kd_loss(
            tensors["student"],
            tensors["head"],
            teacher,
            tensors["labels"],
            student_bias=tensors["bias"] if biases else None,
            softcap=softcap,
            impl=impl,
            **given,
        )
    )


def _logit_cases() -> Iterator[Case]:
    """`kd_loss`: every divergence and dtype, and what may be asked of a row."""

    def case(name: str, make: Callable[[], Tensors], **options: Any) -> Case:
        return Case(f"kd_loss {name}", make, partial(_kd, **options), ("student",))

    dtypes = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)]
    for number, (name, divergence) in enumerate(DIVERGENCES.items()):
        student, teacher = dtypes[number % len(dtypes)]
        words = " and ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((student, teacher)))
        yield case(f"{name} {words}", partial(_logits, RAGGED, student, teacher), divergence=divergence)

    def mapped() -> Tensors:
        ids = torch.randperm(RAGGED + 60)[:RAGGED]
        ids[::7] = -1
        return _logits(RAGGED, teacher_vocabulary=RAGGED + 60) | {"vocab_map": ids}

    def weighted() -> Tensors:
        return _logits(ALIGNED, BF16) | {"token_weight": torch.tensor([0.5, 1.0, 0.0])}

    def sparse() -> Tensors:
        teacher = _normal(3, RAGGED).log_softmax(-1).topk(20)
        return _logits(RAGGED, BF16) | {"logprobs": teacher.values, "indices": teacher.indices}

    def infinite() -> Tensors:
        tensors = _logits(RAGGED)
        tensors["teacher"][:, ::5] = float("-inf")
        return tensors

    def top_k(tensors: Tensors, impl: Impl | None, *, tail: Any, **options: Any) -> tuple[Tensor, ...]:
        teacher: Any = TeacherTopK(tensors["logprobs"], tensors["indices"], tail)
        return _kd(tensors | {"teacher": teacher}, impl, **options)

    yield case("index map, statistics", mapped, divergence=ReverseKL(), return_stats=True)
    prefix = partial(_logits, RAGGED, FP32, None, 4200)
    yield case("shared prefix, statistics", prefix, vocab_map="shared_prefix", return_stats=True)
    yield case(
        "shared prefix, longer student", partial(_logits, 4200, FP32, None, RAGGED), vocab_map="shared_prefix"
    )
    yield case("softcap, label smoothing", partial(_logits, RAGGED), softcap=8.0, label_smoothing=0.1)
    yield case("logit scale, statistics", partial(_logits, LONG, BF16), logit_scale=0.5, return_stats=True)
    yield case("weights of rows, bfloat16, full tiles", weighted, divergence=JSD(0.5), reduction="sum")
    yield case("a classifier's 37 classes", partial(_logits, SHORT), divergence=Decoupled(2.0, 0.5))
    yield case("teacher with -inf", infinite, divergence=ForwardKL(), temperature=1.0, ce_weight=0.0)
    yield case(
        "labels only", partial(_logits, RAGGED, BF16), kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1
    )
    for tail in ("renormalize", "bucket"):
        call = partial(top_k, tail=tail, divergence=ReverseKL() if tail == "bucket" else ForwardKL())
        yield Case(f"kd_loss top-k, {tail}", sparse, call, ("student",))


def _linear_cases() -> Iterator[Case]:
    """`linear_kd_loss`: half-precision gradients over float32 logits, chunks, and tiles of the vocabulary."""
    leaves = ("student", "head", "bias")

    def case(name: str, make: Callable[[], Tensors], **options: Any) -> Case:
        gradients = leaves if options.get("biases", True) else leaves[:2]
        return Case(f"linear_kd_loss {name}", make, partial(_linear, **options), gradients, roundings=2)

    for number, (name, divergence) in enumerate(DIVERGENCES.items()):
        dtype = FP16 if number % 3 == 2 else BF16
        words = f"{name}, {str(dtype).removeprefix('torch.')} over float32"
        yield case(words, partial(_heads, LONG if number < 3 else RAGGED, dtype), divergence=divergence)
    rows = 8 * (RAGGED + 16) * 2  # bytes of chunks of two rows
    yield case("chunks of two rows", partial(_heads, RAGGED, BF16, 6), chunk_bytes=rows, divergence=TVD())
    yield case("float32 in place, no biases", partial(_heads, ALIGNED, FP32), biases=False)
    yield case("softcaps, bfloat16 over float32", partial(_heads, RAGGED, BF16), softcap=6.0)
    tiles: dict[str, Any] = {"mode": "low_memory", "chunk_bytes": 8 * 4 * 1040}
    for name in ("forward_kl", "jsd", "decoupled"):
        yield case(f"tiles, {name}", partial(_heads, RAGGED, BF16), divergence=DIVERGENCES[name], **tiles)
    shared = partial(_heads, RAGGED, FP32, 4, 1100)
    yield case("tiles, shared prefix", shared, divergence=SkewKL(0.3), vocab_map="shared_prefix", **tiles)

    def cross() -> Tensors:
        tensors = _heads(RAGGED, BF16)
        return tensors | {
            "cross": _normal(4, 16),
            "cross_bias": _normal(4, scale=0.1),
            "entropy": torch.rand(4) + 1.0,
        }

    def cross_term(tensors: Tensors, impl: Impl | None) -> tuple[Tensor, ...]:
        teacher = TeacherCrossTerm(tensors["cross"], tensors["cross_bias"], tensors["entropy"], 2.0)
        loss = kdkernels.linear_kd_loss(
            tensors["student"],
            tensors["head"],
            teacher,
            tensors["labels"],
            student_bias=tensors["bias"],
            temperature=2.0,
            ce_weight=0.5,
            impl=impl,
        )
        return (loss,)

    yield Case("linear_kd_loss cross-term", cross, cross_term, ("student",), roundings=2)


def _feature_cases() -> Iterator[Case]:
    """Projections, directions, relations of tokens, and windows of neighbours."""

    def features(
        rows: int, student: int, teacher: int, dtype: torch.dtype, projected: bool = True
    ) -> Tensors:
        made = {
            "student": _normal(rows, student, dtype=dtype),
            "teacher": _normal(rows, teacher, dtype=dtype),
            "mask": torch.arange(rows) % 3 != 1,
        }
        if projected:
            made |= {
                "weight": _normal(teacher, student, scale=0.3, dtype=dtype),
                "bias": _normal(teacher, dtype=dtype),
            }
        return made

    def distance(tensors: Tensors, impl: Impl | None, *, loss: str, **options: Any) -> tuple[Tensor, ...]:
        function: Any = getattr(kdkernels, loss)
        projection = [tensors[name] for name in ("weight", "bias") if name in tensors]
        return (
            function(
                tensors["student"],
                tensors["teacher"],
                *projection,
                mask=tensors["mask"],
                impl=impl,
                **options,
            ),
        )

    mapped, plain = ("student", "weight", "bias"), ("student",)
    for words, loss, sizes, leaves, options in (
        ("projection_mse bfloat16", "projection_mse", (4, 40, 2101, BF16), mapped, {}),
        ("projection_mse float32, full tiles", "projection_mse", (4, 32, 2048, FP32), mapped, {}),
        (
            "projection_mse normalised float16",
            "projection_mse",
            (4, 24, 99, FP16),
            mapped,
            {"normalize": True},
        ),
        ("cosine_loss bfloat16", "cosine_loss", (4, 24, 2101, BF16), mapped, {}),
        ("cosine_loss float32, as they are", "cosine_loss", (4, 2101, 2101, FP32, False), plain, {}),
        ("projection_mse float32, as they are", "projection_mse", (4, 99, 99, FP32, False), plain, {}),
    ):
        yield Case(
            words, partial(features, *sizes), partial(distance, loss=loss, **options), leaves, roundings=2
        )

    def attention(dtype: torch.dtype, student: int, teacher: int, alone: bool) -> Tensors:
        made = {
            "student": _normal(2, 21, student, dtype=dtype),
            "teacher": _normal(2, 21, teacher, dtype=dtype),
            "mask": torch.arange(21) < torch.tensor([[21], [13]]),
        }
        if not alone:
            made |= {
                "key": _normal(2, 21, student, dtype=dtype),
                "teacher_key": _normal(2, 21, teacher, dtype=dtype),
            }
        return made

    def relations(tensors: Tensors, impl: Impl | None, **options: Any) -> tuple[Tensor, ...]:
        sides = [tensors[name] for name in ("student", "teacher", "key", "teacher_key") if name in tensors]
        return (kdkernels.relation_kl(*sides, mask=tensors["mask"], impl=impl, **options),)

    for words, make, leaves, options in (
        ("bfloat16", (BF16, 32, 48, True), plain, {"heads": 2}),
        ("float32, causal", (FP32, 32, 32, True), plain, {"heads": 2, "causal": True}),
        ("float16, queries and keys", (FP16, 40, 24, False), ("student", "key"), {"heads": 2}),
    ):
        yield Case(f"relation_kl {words}", partial(attention, *make), partial(relations, **options), leaves)

    def layers(dtype: torch.dtype, repeated: bool = False) -> Tensors:
        made = {
            "student": _normal(1, 2, 14, 20, dtype=dtype),
            "teacher": _normal(1, 2, 14, 24, dtype=dtype),
            "mask": (torch.arange(14) < 11)[None],
        }
        if repeated:  # neighbours that are nearly equal are compared by their differences
            made["student"][:, :, 5] = made["student"][:, :, 4] * (1.0 + 2.0**-12)
        return made

    def windows(tensors: Tensors, impl: Impl | None, **options: Any) -> tuple[Tensor, ...]:
        loss = kdkernels.contextual_relation_loss(
            tensors["student"], tensors["teacher"], mask=tensors["mask"], impl=impl, **options
        )
        return (loss,)

    for words, make, options in (
        ("float32", (FP32,), {"window": 2}),
        ("bfloat16, layers", (BF16,), {"window": 2, "layer_weight": 1.0}),
        ("nearly equal neighbours", (FP32, True), {"window": 2}),
    ):
        yield Case(f"contextual windows {words}", partial(layers, *make), partial(windows, **options), plain)


def cases() -> list[Case]:
    """Everything that is executed."""
    return [*_logit_cases(), *_linear_cases(), *_feature_cases()]
