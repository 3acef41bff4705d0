"""Checks of arguments that several losses share, each with its sentence: what was given, why it cannot be, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import get_args

import torch
from torch import Tensor

from ..options import Impl, Reduction
from .compiling import values_can_be_read
from .rows import refuse_labels

# Below, float32 does not hold T squared. Above, a divergence of 1 / T^2 has fewer than three digits in float32: its terms
# are differences of log-probabilities that are all near log V.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(tensor: Tensor) -> str:
    """The shape as it is written in a sentence: (8, 7, 5)."""
    return str(tuple(tensor.shape))


def check_number(name: str, value: object) -> None:
    """A finite plain number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a plain number, got {type(value).__name__}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        finite = False
    if not finite:
        raise ValueError(f"{name} must be finite, got {value}")


def refuse_unknown(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first keyword that the function does not have, with the nearest that it has."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1) or [one for one in known if one.startswith(name)]
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise TypeError(f"{function} has no keyword {name!r}; {hint}")


def check_temperature(temperature: float) -> None:
    """A number above 0 at which float32 holds T squared and the digits of a divergence."""
    check_number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; 1.0 leaves the logits as they are")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature must lie in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], where T squared times a divergence has "
            f"its digits in float32, got {temperature:g}"
        )


def check_integer(name: str, value: object) -> None:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_impl(impl: object) -> None:
    """None or the name of a back end."""
    if impl is not None:
        check_choice("impl", impl, get_args(Impl))


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_reduction(reduction: Reduction, num_items_in_batch: int | Tensor | None) -> None:
    """A known reduction, and `num_items_in_batch` only where something is divided by it."""
    check_choice("reduction", reduction, get_args(Reduction))
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items_in_batch is what a mean divides by, but reduction is {reduction!r}; "
            "use reduction='mean' or leave num_items_in_batch out"
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.dim() != 0:
            raise ValueError(
                f"num_items_in_batch must be a number or a 0-D tensor, got shape {shape_of(num_items_in_batch)}"
            )
        if num_items_in_batch.requires_grad:
            raise ValueError("num_items_in_batch must not require grad; pass num_items_in_batch.detach()")
        if not values_can_be_read(num_items_in_batch):
            return  # reading it would be a host sync, or break the graph
    number = num_items_in_batch.item() if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    check_number("num_items_in_batch", number)
    if number < 0:
        raise ValueError(f"num_items_in_batch must not be negative, got {number}")


def check_tensor(name: str, tensor: object) -> Tensor:
    """A floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor, of which each rank holds a part; use it inside the wrapped module's forward, "
            f"where it is whole, or pass {name}.full_tensor()"
        )
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    check_dense(name, tensor)
    return tensor


def check_dense(name: str, tensor: Tensor) -> None:
    """A tensor with strided memory."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has the layout {tensor.layout}; pass {name}.to_dense()")
    if tensor.is_nested:
        raise ValueError(f"{name} is a nested tensor; pad it and give the padding the label ignore_index")


def check_integers(name: str, tensor: object, what: str) -> Tensor:
    """An int64 or int32 tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be an int64 tensor of {what}, got {kind}")
    check_dense(name, tensor)
    return tensor


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """On the device of another tensor."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {like_name} on {like.device}; move them to one device"
        )


def check_frozen(name: str, tensor: Tensor | None) -> None:
    """No gradient is wanted for a teacher's tensor."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the teacher is frozen here and would get no gradient; "
            "run the teacher under torch.no_grad(), or pass the tensor's .detach()"
        )


def check_head(
    side: str,
    hidden: object,
    weight: object,
    bias: object,
    *,
    hidden_name: str,
    weight_name: str,
    bias_name: str,
    same_dtype: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden (..., D), weight (V, D) and bias (V,) that fit together."""
    hidden, weight = check_tensor(hidden_name, hidden), check_tensor(weight_name, weight)
    if hidden.dim() < 2:
        raise ValueError(f"{hidden_name} must have shape (..., D), got {shape_of(hidden)}; add a row axis")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{weight_name} must have shape (V, D) with V and D above 0, got {shape_of(weight)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{hidden_name} has width {hidden.shape[-1]} but {weight_name} takes {weight.shape[1]} "
            f"(shapes {shape_of(hidden)} and {shape_of(weight)}); pass the hidden states that enter the {side} head"
        )
    if same_dtype and hidden.dtype != weight.dtype:
        raise ValueError(
            f"{hidden_name} is {hidden.dtype} and {weight_name} is {weight.dtype}; "
            "cast one of them, or call the loss inside torch.autocast"
        )
    check_device(weight_name, weight, hidden, hidden_name)
    if bias is None:
        return hidden, weight, None
    bias = check_tensor(bias_name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} must have shape ({weight.shape[0]},), got {shape_of(bias)}")
    check_device(bias_name, bias, hidden, hidden_name)
    return hidden, weight, bias


def check_rows(
    student_name: str,
    student: Tensor,  # (..., D) or (..., V)
    vocabulary: int,
    labels: Tensor | None,
    token_weight: Tensor | None,
    ce_weight: float,
    ignore_index: int,
) -> None:
    """Labels and token weights have one entry per row; on the CPU labels are also checked for range."""
    if labels is None and ce_weight != 0.0:
        raise ValueError(
            f"ce_weight is {ce_weight} but there are no labels; pass labels or set ce_weight=0.0"
        )
    if labels is not None:
        check_integers("labels", labels, "class ids")
        check_per_row("labels", labels, student_name, student)
        if values_can_be_read(labels):
            refuse_labels(labels, labels != ignore_index, vocabulary)
    if token_weight is not None:
        check_tensor("token_weight", token_weight)
        check_per_row("token_weight", token_weight, student_name, student)
        if token_weight.requires_grad:
            raise ValueError("token_weight must not require grad; pass token_weight.detach()")


def check_per_row(name: str, tensor: Tensor, student_name: str, student: Tensor) -> None:
    """One entry per row, on the device of the student."""
    if tensor.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(student.shape[:-1])} to go with {student_name} "
            f"{shape_of(student)}, got {shape_of(tensor)}"
        )
    check_device(name, tensor, student, student_name)


def check_student_logits(student_logits: object) -> Tensor:
    """Student logits (..., V)."""
    logits = check_tensor("student_logits", student_logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"student_logits must have shape (..., V) with V above 0, got {shape_of(logits)}")
    return logits


def check_bool_mask(mask: object, student: Tensor, shape: Sequence[int], what: str) -> None:
    """A boolean mask of this shape, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be a bool tensor, True where a {what} counts, got {kind}; use mask.bool()"
        )
    if mask.shape != shape:
        raise ValueError(
            f"mask must have shape {tuple(shape)}, one entry for each {what} of student {shape_of(student)}, "
            f"got {shape_of(mask)}"
        )
    check_dense("mask", mask)
    check_device("mask", mask, student, "student")


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    """A positive number of bytes."""
    if chunk_bytes is None:
        return
    check_integer("chunk_bytes", chunk_bytes)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be above 0, got {chunk_bytes}")


def check_chunk_holds(chunk_bytes: int | None, columns: int) -> None:
    """At least one row of `columns` entries in each of the two float32 buffers."""
    if chunk_bytes is not None and chunk_bytes < 8 * columns:
        raise ValueError(
            f"chunk_bytes must be at least {8 * columns}, two float32 rows of {columns} logits, got {chunk_bytes}; "
            "leave it at None for the default"
        )
