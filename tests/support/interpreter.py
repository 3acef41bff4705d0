"""Triton's interpreter, without the work that it repeats, and with the rounding of a device."""

from typing import Any

import numpy as np


class _Kept:
    """What the interpreter asks to put the language back after a launch; here the language stays exchanged."""

    def restore(self) -> None:
        pass


def patch_language_once() -> None:
    """Exchange the language's functions for interpreted ones once for each module of kernels.

    The interpreter does that at every launch and at every call of a device function, going through the whole language
    each time to put in the same functions: more than half of the time of our kernels, and none of what they compute.
    Nothing in such a process compiles a kernel, so nobody needs the language as it was.
    """
    from triton.runtime import interpreter

    patch = getattr(
        interpreter, "_patch_lang", None
    )  # so in Triton 3.6 to 3.9; without it tests are only slower
    if patch is None:
        return
    done: set[str] = set()

    def patch_once(function: Any) -> _Kept:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return _Kept()

    interpreter._patch_lang = patch_once


def patch_bfloat16_rounding() -> None:
    """Round float32 to the nearest bfloat16, as every device does; the interpreter cuts the last 16 bits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounding(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (
            source != tl.float32
            or target != tl.bfloat16
            or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        ):
            return convert(values, source, target, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)

    interpreter._convert_float = convert_rounding
