"""Compile the Triton kernels without a GPU and count what came out: registers, spills, widths of loads and stores.

    python -m tests.support.compiled sm_90 gfx942      # a table; needs TRITON_INTERPRET unset

Runs in a process of its own: under TRITON_INTERPRET=1 a kernel is an interpreted function that nothing can compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: dtypes of its pointers, its flags, and what is known of the sizes of its rows."""

    name: str
    kernel: str  # "kd_rows" or "mse_rows"
    dtypes: dict[str, str]  # of the pointers that vary, by the name in the kernel without _ptr
    flags: dict[str, Any]
    aligned: tuple[str, ...] = ("stride", "V", "D")  # integers, by start of name, known to be multiples of 16
    wide: bool = True  # whether logits have to be read 128 bits at a time


@dataclass(frozen=True)
class Counts:
    """What a compiled kernel needs. Bytes of shared memory and spills; loads and stores of global memory by bits."""

    variant: str
    architecture: str
    registers: int
    shared: int
    spills: int
    instructions: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)


def _kd(name: str, divergence: str, student: str, teacher: str, grad: str, **rest: Any) -> Variant:
    flags = {
        "DIVERGENCE": divergence,
        "HAS_LABELS": True,
        "CE_AT_ONE": True,
        "HAS_STUDENT_BIAS": False,
        "HAS_TEACHER_BIAS": False,
        "HAS_ROW_WEIGHT": True,
        "WRITE_GRAD": True,
        "ALIASED": False,
    }
    options = {key: rest.pop(key) for key in ("aligned", "wide") if key in rest}
    dtypes = {"student": student, "teacher": teacher, "grad": grad}
    return Variant(f"{divergence} {name}", "kd_rows", dtypes, flags | rest, **options)


def main_variants() -> list[Variant]:
    """What most steps run, compiled for every architecture."""
    name = "fp32 > bf16 over it, CE"
    variants = [_kd(name, divergence, "fp32", "fp32", "bf16", ALIASED=True) for divergence in DIVERGENCES]
    return [*variants, _kd("bf16, CE", "forward_kl", "bf16", "bf16", "bf16"), _mse("fp32")]


def other_variants() -> list[Variant]:
    """With the main ones: every flag on and off in every divergence, every pair of dtypes, and rows not aligned."""
    biases = {"HAS_STUDENT_BIAS": True, "HAS_TEACHER_BIAS": True}
    plain = {"HAS_LABELS": False, "CE_AT_ONE": False, "HAS_ROW_WEIGHT": False}
    # Odd V: rows that start anywhere, as stored logits do; and rows padded to a multiple of 16, as our own buffers are.
    ragged, padded = {"aligned": (), "wide": False}, {"aligned": ("stride",), "wide": False}
    variants = []
    for divergence in DIVERGENCES:
        variants += [
            _kd("fp32 in place", divergence, "fp32", "fp32", "fp32", **plain),
            _kd("fp32 in place, padded, CE", divergence, "fp32", "fp32", "fp32", **padded),
            _kd("fp32 values, CE", divergence, "fp32", "fp32", "fp32", WRITE_GRAD=False),
            _kd("fp32, ragged, CE", divergence, "fp32", "fp32", "fp32", **ragged),
            _kd("fp32 > fp16 over it, biases", divergence, "fp32", "fp32", "fp16", ALIASED=True, **biases),
            _kd(
                "fp32 > bf16 over it, padded, biases",
                divergence,
                "fp32",
                "fp32",
                "bf16",
                ALIASED=True,
                **biases,
                **padded,
            ),
            _kd("bf16, CE at T=1, biases", divergence, "bf16", "bf16", "bf16", CE_AT_ONE=False, **biases),
            _kd("bf16, ragged, biases", divergence, "bf16", "bf16", "bf16", **biases, **ragged),
        ]
    return [
        *variants,
        _kd("bf16, CE", "reverse_kl", "bf16", "bf16", "bf16"),
        _kd("bf16, CE", "jsd", "bf16", "bf16", "bf16"),
        _kd("fp32 and bf16", "forward_kl", "fp32", "bf16", "fp32"),
        _mse("fp32", HAS_BIAS=True, SCALE_IN_MEMORY=True),
        _mse("fp32", WRITE_GRAD=False, HAS_ROW_WEIGHT=False),
        _mse("fp32", aligned=(), wide=False, HAS_BIAS=True),
    ]


def _mse(prediction: str, target: str = "bf16", **rest: Any) -> Variant:
    flags = {"HAS_BIAS": False, "HAS_ROW_WEIGHT": True, "SCALE_IN_MEMORY": False, "WRITE_GRAD": True}
    options = {key: rest.pop(key) for key in ("aligned", "wide") if key in rest}
    words = [key.lower() for key, value in rest.items() if value is True] + ["ragged"] * (
        options.get("aligned") == ()
    )
    words += [f"no {key.lower()}" for key, value in rest.items() if value is False]
    name = f"mse {prediction} and {target} {', '.join(words)}".strip()
    return Variant(name, "mse_rows", {"prediction": prediction, "target": target}, flags | rest, **options)


def compile_variant(variant: Variant, architecture: str) -> Any:
    """Triton's compiled kernel, launched as the back end would launch it on that architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdkernels._triton import projection, rows
    from kdkernels._triton.configs import launch_options, row_config

    kernel: Any = rows._kd_rows_kernel if variant.kernel == "kd_rows" else projection._mse_rows_kernel
    config = row_config(architecture)
    constants = variant.flags | {"BLOCK": config.block, "WIDTH": config.width}
    fixed = {"labels": "i64", "row_weight": "fp32", "kd": "fp32", "ce": "fp32", "squares": "fp32"}
    # A bias has the dtype of its head, which in the linear loss is the dtype that the gradient is written in.
    biases = dict.fromkeys(("student_bias", "teacher_bias", "bias"), variant.dtypes.get("grad", "fp32"))
    pointers = fixed | biases | variant.dtypes
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr") or (name == "scale" and variant.flags["SCALE_IN_MEMORY"]):
            signature[name] = f"*{pointers.get(name.removesuffix('_ptr'), 'fp32')}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride") or name in ("V", "D"):
            signature[name] = "i32"
            if name.startswith(variant.aligned):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    sizes = [
        16 if name.startswith(variant.aligned) else 1 for name, kind in signature.items() if kind == "i32"
    ]
    return triton.compile(source, target=target, options=launch_options(config, *sizes))


def _cuobjdump(cubin: Path, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def count(variant: Variant, architecture: str) -> Counts:
    """Compile and count."""
    compiled = compile_variant(variant, architecture)
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    if architecture.startswith("sm_"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            code, usage = _cuobjdump(cubin, "--dump-sass"), _cuobjdump(cubin, "-res-usage")
        opcodes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code)
        for opcode in opcodes:
            kind = {"LDG": "load", "STG": "store"}.get(opcode.split(".")[0])
            if kind is not None:
                bits = re.search(r"\.(256|128|64|U16|S16|U8|S8)\b", opcode)
                widths[kind][int(bits[1].strip("US")) if bits else 32] += 1
        resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        # A spill shows as a stack frame and as instructions on local memory; each instruction counts at least a word.
        on_stack = sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
        spills = max(int(resources["STACK"]), int(resources["LOCAL"]), 4 * on_stack)
        registers, instructions = int(resources["REG"]), len(opcodes)
    else:
        code = compiled.asm["amdgcn"]
        words = {
            "dwordx4": 128,
            "dwordx3": 96,
            "dwordx2": 64,
            "dword": 32,
            "ushort": 16,
            "short": 16,
            "ubyte": 8,
        }
        for kind, size in re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", code, re.MULTILINE):
            widths[kind][next((bits for word, bits in words.items() if word in size), 0)] += 1
        # An instruction is an indented lower-case word; directives start with a dot and labels end in a colon.
        instructions = len(re.findall(r"^\s+[a-z]\w+[ \n]", code, re.MULTILINE))
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code))
        scratch = re.search(r"ScratchSize: (\d+)", code)
        assert scratch is not None
        spills = max(
            int(scratch[1]), 4 * int(numbers["vgpr_spill_count"]), 4 * int(numbers["sgpr_spill_count"])
        )
        registers = int(numbers["vgpr_count"])
    loads, stores = (dict(sorted(widths[kind].items(), reverse=True)) for kind in ("load", "store"))
    shared = int(compiled.metadata.shared)
    return Counts(variant.name, architecture, registers, shared, spills, instructions, loads, stores)


def table(counts: list[Counts]) -> str:
    """The counts as lines of a Markdown table."""
    lines = ["| variant | arch | registers | shared B | spill B | instructions | loads | stores |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in counts:
        loads, stores = (
            " ".join(f"{n}x{bits}" for bits, n in widths.items()) for widths in (row.loads, row.stores)
        )
        lines.append(
            f"| {row.variant} | {row.architecture} | {row.registers} | {row.shared} | {row.spills} | "
            f"{row.instructions} | {loads} | {stores} |"
        )
    return "\n".join(lines)


def work(portion: int, portions: int) -> list[tuple[Variant, str]]:
    """One portion of what the test compiles: everything for sm_90, the main variants for the rest."""
    everything = [(variant, "sm_90") for variant in main_variants() + other_variants()]
    for architecture in ARCHITECTURES:
        if architecture != "sm_90":
            everything += [(variant, architecture) for variant in main_variants()]
    return everything[portion::portions]


if __name__ == "__main__":
    if sys.argv[1] == "--portion":
        for variant, architecture in work(int(sys.argv[2]), int(sys.argv[3])):
            print(json.dumps(asdict(count(variant, architecture))), flush=True)
    else:
        chosen = [(variant, name) for name in sys.argv[1:] for variant in main_variants() + other_variants()]
        print(table([count(variant, architecture) for variant, architecture in chosen]))
