"""What PTX instructions compute: arithmetic, comparisons, conversions and exchanges between the lanes of a warp.

Approximate instructions and fused multiply-adds are rounded once from a more exact value: results differ from a GPU's by
a unit or two of the last place.
"""

import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from tests.support.ptx_warp import LANE, LANES, Array, Warp

Read = Callable[[Warp], Array]

TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": f"u{bits // 8}" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (16, 32, 64)},
    **{"f16": "f2", "f32": "f4", "f64": "f8", "pred": "?"},
    "f32x2": "f4",  # both numbers of a 64-bit register
}

# Instructions that take numbers of one type and return one of that type, by their first word.
ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "div": np.divide,
    "max": lambda *numbers: reduce(np.fmax, numbers),  # of integers, too; of two or three
    "min": lambda *numbers: reduce(np.fmin, numbers),
    "sqrt": np.sqrt,
    "abs": np.abs,
    "neg": np.negative,
    "rcp": np.reciprocal,
    "ex2": np.exp2,
    "lg2": np.log2,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "mov": lambda a: a,
    "bfe": lambda a, place, count: (a << (a.itemsize * 8 - place - count)) >> (a.itemsize * 8 - count),
    # A shift by all bits or more leaves zeros, or signs.
    "shl": lambda a, by: np.where(by < a.itemsize * 8, a << np.minimum(by, a.itemsize * 8 - 1), 0),
    "shr": lambda a, by: np.where(
        (by < a.itemsize * 8) | (a.dtype.kind == "i"), a >> np.minimum(by, a.itemsize * 8 - 1), 0
    ),
}
# Those of which some operands are of another type than the instruction.
OPERAND_TYPES = {"shl": (None, "u32"), "shr": (None, "u32"), "bfe": (None, "u32", "u32")}

# The unordered twins (`neu`) are true where either number is NaN.
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b),
}


def value_of(words: list[str], result: str, operands: list[str]) -> Read:
    """What an instruction computes for its result."""
    word, kind = words[0], words[-1]
    if word == "ld":
        wide = "i8" if kind == "s32" and result.startswith("%rd") else None
        name = operands[0].strip("[] ")

        def parameter(warp: Warp) -> Array:
            value = warp.registers[name].view(TYPES[kind])
            return value if wide is None else value.astype(wide)

        return parameter
    if word == "cvt":
        return _conversion(words, operands)
    if word == "setp":
        compare, negated = COMPARISONS.get(words[1]), False
        if compare is None:
            twins = {"neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "nan": "num"}
            compare, negated = COMPARISONS[twins[words[1]]], True
        a, b = (read_as(operand, kind) for operand in operands)
        return lambda warp: compare(a(warp), b(warp)) != negated
    if word == "selp":
        a, b = (read_as(operand, kind) for operand in operands[:2])
        return lambda warp: np.where(warp.registers[operands[2]], a(warp), b(warp))
    if word == "shfl":
        a, other = read_as(operands[0], "b32"), LANE ^ int(operands[1])
        assert words[2] == "bfly" and operands[2:] == ["31", "-1"]

        def exchange(warp: Warp) -> Array:
            warp.together()
            return a(warp)[other]

        return exchange
    if word == "redux":
        a, reduce_all = read_as(operands[0], kind), {"max": np.fmax, "min": np.fmin}[words[2]].reduce

        def join(warp: Warp) -> Array:
            warp.together()
            return np.repeat(reduce_all(a(warp), keepdims=True), LANES)

        return join
    if word == "mov" and operands[0].startswith("{"):  # a register put together
        parts = [
            read_as(name, f"b{int(kind[1:]) // len(members(operands[0]))}") for name in members(operands[0])
        ]
        return lambda warp: np.stack([part(warp) for part in parts], 1).view(TYPES[kind])[:, 0]
    return _arithmetic(words, operands)


def _arithmetic(words: list[str], operands: list[str]) -> Read:
    word, kind = words[0], words[-1]
    function = ARITHMETIC[word]
    kinds = [own or kind for own in OPERAND_TYPES.get(word, (None,) * len(operands))]
    if kind in ("bf16", "f16") and words[-2] == "f32":  # all but the last operand are halves
        halves = [read_as(operand, "b16") for operand in operands[:-1]]
        last = read_as(operands[-1], "f32")
        return lambda warp: function(*(from_half_bits(half(warp), kind) for half in halves), last(warp))
    reads = [read_as(operand, own) for operand, own in zip(operands, kinds, strict=True)]
    if word in ("mul", "mad") and words[1] == "wide":
        wide = f"{TYPES[kind][0]}{2 * int(TYPES[kind][1])}"
        reads = [*reads[:2], *(read_as(operand, f"{kind[0]}{2 * int(kind[1:])}") for operand in operands[2:])]
        return lambda warp: function(*(read(warp).astype(wide) for read in reads))
    bits = "u8" if kind == "f32x2" else None
    flush = "ftz" in words

    def compute(warp: Warp) -> Array:
        value = function(*(read(warp) for read in reads))
        value = value.astype(TYPES[kind], copy=False)
        if flush:
            value = np.where(np.abs(value) < np.finfo(np.float32).tiny, np.float32(0.0), value)
        return value if bits is None else value.view(bits)

    return compute


def _conversion(words: list[str], operands: list[str]) -> Read:
    *_, to, source = words
    if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
        upper, lower = (read_as(operand, "f32") for operand in operands)
        kind = to.removesuffix("x2")
        return lambda warp: (
            half_bits(lower(warp), kind) | half_bits(upper(warp), kind).astype(np.uint32) << 16
        ).astype(np.uint32)
    if to in ("bf16", "f16") and source == "f32":
        read = read_as(operands[0], "f32")
        return lambda warp: half_bits(read(warp), to)
    if source in ("bf16", "f16") and to == "f32":
        read = read_as(operands[0], "b16")
        return lambda warp: from_half_bits(read(warp), source)
    read = read_as(operands[0], source)
    if to[0] == "f" and source[0] == "f":
        raise KeyError(to)
    return lambda warp: read(warp).astype(TYPES[to])


def half_bits(values: Array, kind: str) -> Array:
    """float32 rounded to nearest even, as the bits of bfloat16 or float16."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def from_half_bits(bits: Array, kind: str) -> Array:
    """float32 of the bits of bfloat16 or float16."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def operands_of(text: str) -> list[str]:
    """Operands between commas; one in braces or brackets is one."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def members(operand: str) -> list[str]:
    """The registers of a vector operand, or the one register."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def read_as(operand: str, kind: str) -> Read:
    """An operand as numbers of a type."""
    dtype = TYPES[kind]
    if operand.startswith("%"):
        return lambda warp: warp.registers[operand].view(dtype)
    if operand == "global_smem":
        value = np.zeros(LANES, dtype)
    elif re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
        value = np.full(LANES, int(operand[2:], 16), np.uint32).view(dtype)
    else:
        value = np.full(LANES, int(operand, 0), np.int64).astype(dtype)
    if dtype == "f4" and kind == "f32x2":
        raise KeyError(operand)
    return lambda warp: value
