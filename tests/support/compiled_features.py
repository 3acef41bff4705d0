"""Compile the Triton kernels of the feature losses without a GPU and count registers, shared memory and spills.

    python -m tests.support.compiled_features sm_90 gfx942      # a table; needs TRITON_INTERPRET unset

Runs in a process of its own: under TRITON_INTERPRET=1 a kernel is an interpreted function that nothing can compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel. Pointers are of `dtype` unless `dtypes` names them; integers not in `loose` are known
    to be multiples of 16."""

    name: str
    kernel: str  # "mse_rows", "direction_rows", "relation_values" or "relation_gradient"
    dtype: str
    dtypes: dict[str, str]
    flags: dict[str, Any]
    loose: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counts:
    """What a compiled kernel needs; shared memory and spills in bytes."""

    variant: str
    architecture: str
    registers: int
    shared: int
    spills: int
    products: int  # matrix instructions


def _direction(name: str, **rest: Any) -> Variant:
    flags = {
        "COSINE": False,
        "HAS_BIAS": True,
        "HAS_ROW_WEIGHT": True,
        "WRITE_GRAD": True,
        "HAS_GRAD_TARGET": True,
        "ALIASED": False,
    }
    loose = rest.pop("loose", ())
    return Variant(f"directions {name}", "direction_rows", "fp32", {"target": "bf16"}, flags | rest, loose)


def _relation(name: str, kernel: str, dtype: str, widths: tuple[int, int], **rest: Any) -> Variant:
    from kdkernels._triton.relations.launch import padded

    flags: dict[str, Any] = {"HAS_MASK": True, "CAUSAL": False}
    if kernel == "relation_gradient":
        flags |= {"AS_QUERIES": True, "AS_KEYS": True}
    flags |= {
        "D_S": widths[0],
        "D_T": widths[1],
        "BLOCK_D_S": padded(widths[0]),
        "BLOCK_D_T": padded(widths[1]),
    }
    fp32 = {"row_weight": "fp32", "statistics": "fp32", "mask": "u8"}
    # A sequence is of any length, and heads and repeats are few.
    loose = ("N", "P", "student_heads", "student_repeats", "teacher_repeats", "statistic_size")
    name = f"{kernel.replace('_', ' ')} {dtype} {widths[0]} and {widths[1]} columns{name}"
    return Variant(name, kernel, dtype, fp32, flags | rest, loose)


def variants(architecture: str) -> list[Variant]:
    """Everything for sm_90, what most steps run for the others."""
    mse = {
        "HAS_BIAS": True,
        "HAS_ROW_WEIGHT": True,
        "WRITE_GRAD": True,
        "ALIASED": True,
    }
    half = {"target": "bf16", "grad": "bf16"}
    chosen = [Variant("mse half gradient over fp32", "mse_rows", "fp32", half, mse)]
    chosen += [_direction("half gradient over fp32", ALIASED=True, HAS_GRAD_TARGET=False)]
    for kernel in ("relation_values", "relation_gradient"):
        chosen += [
            _relation("", kernel, "bf16", (64, 128)),
            _relation("", kernel, "fp32", (64, 64)),
        ]
    if architecture == "gfx942":
        # Its table has configurations of its own.
        chosen += [
            _relation("", kernel, dtype, (width, width))
            for kernel in ("relation_values", "relation_gradient")
            for dtype, width in (("bf16", 256), ("fp32", 128))
        ]
    if architecture != "sm_90":
        return chosen
    chosen += [
        _direction("both gradients"),
        _direction("cosine of one side", COSINE=True, HAS_GRAD_TARGET=False, HAS_BIAS=False),
        _direction("values", WRITE_GRAD=False, HAS_GRAD_TARGET=False),
        _direction("ragged", loose=("D", "stride")),
    ]
    for kernel in ("relation_values", "relation_gradient"):
        # One width for every row of the table, one that is padded, and the flags.
        chosen += [_relation("", kernel, "bf16", (width, width)) for width in (16, 96, 256)]
        chosen.append(_relation("", kernel, "fp32", (128, 128)))
    return [
        *chosen,
        _relation(", causal, no mask", "relation_values", "bf16", (64, 64), CAUSAL=True, HAS_MASK=False),
        _relation(", queries", "relation_gradient", "bf16", (64, 64), AS_KEYS=False),
        _relation(", keys, causal", "relation_gradient", "fp32", (64, 64), AS_QUERIES=False, CAUSAL=True),
        _relation(", causal", "relation_gradient", "bf16", (48, 64), CAUSAL=True),
    ]


def compile_variant(variant: Variant, architecture: str) -> Any:
    """Triton's compiled kernel, launched as the back end would launch it on that architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdkernels._triton import directions, launch, projection
    from kdkernels._triton.relations import gradients, values
    from kdkernels._triton.relations.launch import relation_config

    kernels: dict[str, Any] = {
        "mse_rows": projection._mse_rows_kernel,
        "direction_rows": directions._direction_rows_kernel,
        "relation_values": values._relation_values_kernel,
        "relation_gradient": gradients._relation_gradients_kernel,
    }
    kernel = kernels[variant.kernel]
    if variant.kernel in ("mse_rows", "direction_rows"):
        row = launch.row_config(architecture)
        constants = variant.flags | {"BLOCK": row.block, "WIDTH": row.width}
        options: dict[str, Any] = launch.launch_options(row, 1 if variant.loose else 16)
    else:
        width = max(variant.flags["BLOCK_D_S"], variant.flags["BLOCK_D_T"])
        tile = relation_config(
            width, variant.dtype != "fp32", variant.kernel == "relation_gradient", architecture
        )
        constants = variant.flags | {
            "INTERPRETED": False,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{variant.dtypes.get(name.removesuffix('_ptr'), variant.dtype)}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name.endswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if not name.startswith(variant.loose):
                attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    return triton.compile(source, target=target, options=options)


def _cuobjdump(cubin: Path, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def count(variant: Variant, architecture: str) -> Counts:
    """Compile and count."""
    compiled = compile_variant(variant, architecture)
    if architecture.startswith("sm_"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            code, usage = _cuobjdump(cubin, "--dump-sass"), _cuobjdump(cubin, "-res-usage")
        resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        # A spill shows as a stack frame and as instructions on local memory; each instruction counts at least a word.
        on_stack = len(re.findall(r"\b(?:LDL|STL)\b", code))
        spills = max(int(resources["STACK"]), int(resources["LOCAL"]), 4 * on_stack)
        registers, products = (
            int(resources["REG"]),
            len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", code)),
        )
    else:
        code = compiled.asm["amdgcn"]
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code))
        scratch = re.search(r"ScratchSize: (\d+)", code)
        assert scratch is not None
        spills = max(int(scratch[1]), *(4 * int(numbers[f"{kind}_spill_count"]) for kind in ("vgpr", "sgpr")))
        registers, products = int(numbers["vgpr_count"]), len(re.findall(r"\bv_mfma", code))
    return Counts(variant.name, architecture, registers, int(compiled.metadata.shared), spills, products)


def table(counts: list[Counts]) -> str:
    """The counts as lines of a Markdown table."""
    lines = [
        "| variant | arch | registers | shared B | spill B | matrix instr |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(str(value) for value in asdict(row).values()) + " |" for row in counts]
    return "\n".join(lines)


def work(portion: int, portions: int, architectures: Sequence[str]) -> list[tuple[Variant, str]]:
    """One portion of what the test compiles."""
    return [(variant, name) for name in architectures for variant in variants(name)][portion::portions]


if __name__ == "__main__":
    if sys.argv[1] == "--portion":
        for variant, architecture in work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]):
            print(json.dumps(asdict(count(variant, architecture))), flush=True)
    else:
        chosen = [(variant, name) for name in sys.argv[1:] for variant in variants(name)]
        for variant, name in chosen:
            print(table([count(variant, name)]).split("\n")[2], flush=True)
