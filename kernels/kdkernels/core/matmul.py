"""The GEMMs of a head, with logits and sums kept in float32 whatever the inputs' dtype.

Half-precision inputs: CUDA multiplies them as they are and writes float32. Other devices have no
such GEMM, so there the inputs are cast to float32, the weight one tile of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

# Rows of a weight cast at a time: 2048 x 4096 in float32 is 32 MiB.
TILE_ROWS = 2048

HALF = (torch.float16, torch.bfloat16)


def has_mixed_gemm(tensor: Tensor) -> bool:
    """True where half inputs are multiplied into a float32 result in one call (NVIDIA GPUs)."""
    return tensor.dtype in HALF and tensor.device.type == "cuda" and torch.version.hip is None


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype losses are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of the inputs of a linear layer on this tensor's device; None when it is off."""
    if tensor.dtype == torch.float64 or tensor.device.type == "meta":
        return None
    if not torch.is_autocast_enabled(tensor.device.type):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """The loss chooses its dtypes itself; inside autocast the GEMMs would be rounded to half precision."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _backends() -> tuple[Any, Any]:
    backends: Any = torch.backends  # its stubs do not know all of it
    return backends.cuda.matmul, backends.mkldnn.matmul


def full_float32() -> AbstractContextManager[Any]:
    """Within it float32 GEMMs multiply float32 numbers, also where the caller allows TF32 or bfloat16 for them.

    Ten bits of a logit are not enough for the difference of two softmaxes that are near each other.
    """
    before = [backend.fp32_precision for backend in _backends()]
    return nullcontext() if set(before) <= {"none", "ieee"} else _full_float32(before)


@contextmanager
def _full_float32(before: list[str]) -> Iterator[None]:
    legacy = None
    with suppress(
        RuntimeError
    ):  # what the caller set through the settings of single back ends has no common name
        legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(_backends(), before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def logit_buffer(rows: int, vocabulary: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, V) for logits of the head `like`, in float32 unless `dtype` is given; on GPUs rows start at multiples of 16 elements.

    The GEMMs take such rows as they are, in float32 and as their half alias, and Triton reads them 128 bits at a
    time only when it knows the stride to be a multiple of 16.
    """
    width = -(-vocabulary // 16) * 16 if like.device.type == "cuda" else vocabulary
    return torch.empty((rows, width), dtype=dtype or accum_dtype(like.dtype), device=like.device)


def head_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (R, V) = hidden (R, D) @ weight (V, D).T in float32 (float64 for float64), or rounded to `out` in the weight's half."""
    if has_mixed_gemm(weight):
        if out.dtype == weight.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    elif weight.dtype in HALF:
        wide = hidden.float()
        for start in range(0, weight.shape[0], TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            if out.dtype == torch.float32:
                torch.mm(wide, weight[rows].float().t(), out=out[:, rows])
            else:
                out[:, rows] = torch.mm(wide, weight[rows].float().t())
    else:
        torch.mm(hidden, weight.t(), out=out)


def hidden_gradient(grad: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> None:
    """out (R, D) float32 or float64 = grad (R, V) @ weight (V, D); `add` adds instead of writing.

    Never in the weight's half precision: a GEMM with as many terms as the vocabulary may be split among them, and its
    parts, which cancel each other, be added after each was rounded.
    """
    if has_mixed_gemm(weight):
        if add:
            torch.addmm(out, grad, weight, out_dtype=torch.float32, out=out)
        else:
            torch.mm(grad, weight, out_dtype=torch.float32, out=out)
    elif weight.dtype in HALF:
        out = out if add else out.zero_()
        for start in range(0, weight.shape[0], TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            out.addmm_(grad[:, rows].to(out.dtype), weight[rows].float())
    elif add:
        out.addmm_(grad, weight)
    else:
        torch.mm(grad, weight, out=out)


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """total (V, D) float32 or float64 += grad (R, V).T @ hidden (R, D); `first` writes instead of adding."""
    if has_mixed_gemm(hidden):
        if first:
            torch.mm(grad.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, grad.t(), hidden, out_dtype=torch.float32, out=total)
        return
    wide, grad = hidden.to(total.dtype), grad.to(total.dtype)
    if first:
        torch.mm(grad.t(), wide, out=total)
    else:
        total.addmm_(grad.t(), wide)
