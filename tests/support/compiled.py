"""Compile the Triton kernels without a GPU and count what came out: registers, spills, widths of loads
and stores, and in the loops over full tiles instructions and bytes moved per column.

    python -m tests.support.compiled sm_90 gfx942      # a table; needs TRITON_INTERPRET unset

Runs in a process of its own: under TRITON_INTERPRET=1 a kernel is an interpreted function that nothing can compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels._triton.kd.flags import RowFlags

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "alpha_beta",
    "chi_squared",
    "renyi",
    "decoupled",
)
PADDED = ("forward_kl", "jsd", "skew_kl", "alpha_beta")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: dtypes of its pointers, its flags, and what is known of the sizes of its rows."""

    name: str
    kernel: str  # a name in `compile_variant`
    dtypes: dict[str, str]  # of the pointers that vary, by the name in the kernel without _ptr
    flags: dict[str, Any]
    aligned: bool = True  # sizes known to be multiples of 16
    padded: bool = False  # strides known to be multiples of 16, sizes not
    wide: bool = True  # whether logits have to be read 128 bits at a time


@dataclass(frozen=True)
class Counts:
    """What a compiled kernel needs. Bytes of shared memory and spills; loads and stores of global memory by bits.

    The last two are of the loops over full tiles, summed over the passes, for each column (NVIDIA only).
    """

    variant: str
    architecture: str
    registers: int
    shared: int
    spills: int
    instructions: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    instructions_per_column: float = 0.0
    bytes_per_column: float = 0.0


def _flags(divergence: str, **rest: Any) -> "RowFlags":
    from kdkernels._triton.kd.divergence import NEEDS_MEAN_PASS
    from kdkernels._triton.kd.flags import RowFlags

    plain: dict[str, Any] = {
        "needs_mean_pass": divergence in NEEDS_MEAN_PASS,
        "has_labels": True,
        "has_ce": True,
        "ce_sum": "own" if divergence == "decoupled" else "at_one",
        "has_row_weight": True,
        "write_grad": True,
    }
    return RowFlags(divergence, **plain | rest)


def _kd(name: str, divergence: str, student: str, teacher: str, grad: str, **rest: Any) -> Variant:
    options = {key: rest.pop(key) for key in ("aligned", "padded", "wide") if key in rest}
    dtypes = {"student": student, "teacher": teacher, "grad": grad}
    return Variant(
        f"{divergence} {name}", "kd_rows", dtypes, {"FLAGS": _flags(divergence, **rest)}, **options
    )


def main_variants() -> list[Variant]:
    """What most steps run, compiled for every NVIDIA architecture; the first three also for AMD's."""
    name = "fp32 > bf16 over it, CE"
    variants = [_kd(name, divergence, "fp32", "fp32", "bf16", aliased=True) for divergence in DIVERGENCES]
    return [*variants, _tile("gradient", "forward_kl"), _sparse_gradient(), _mse("fp32")]


def other_variants() -> list[Variant]:
    """With the main ones: every divergence from half logits and with all biases, every flag, rows not aligned."""
    biases = {"has_student_bias": True, "has_teacher_bias": True}
    # Odd V: rows that start anywhere, as stored logits do; and rows padded to a multiple of 16, as our own buffers are.
    ragged = {"aligned": False, "wide": False}
    padded = {"aligned": False, "padded": True, "wide": False}
    variants = []
    variants += [_kd("bf16, CE", divergence, "bf16", "bf16", "bf16") for divergence in DIVERGENCES]
    for divergence in DIVERGENCES:
        variants += [
            _kd(
                "bf16 values, state kept", divergence, "bf16", "bf16", "bf16", write_grad=False, state="save"
            ),
            _kd("bf16 gradient from a state", divergence, "bf16", "bf16", "bf16", state="load"),
        ]
    over: Any = ("fp32", "fp32", "bf16")
    for divergence in PADDED:
        name = "fp32 > bf16 over it, padded, biases"
        variants.append(_kd(name, divergence, *over, aliased=True, **biases, **padded))
    plain = {"has_labels": False, "has_ce": False, "ce_sum": "shared", "has_row_weight": False}
    softcaps = {"student_transform": "softcap", "teacher_transform": "softcap"}
    smoothing = {"has_smoothing": True, "ce_sum": "own"}
    index: dict[str, Any] = {"vocab_map": "index", "wide": False} | smoothing | softcaps
    for divergence in ("forward_kl", "alpha_beta"):
        variants += [
            _kd("fp32 > bf16, softcaps", divergence, *over, aliased=True, **softcaps),
            _kd("fp32 > bf16, smoothing", divergence, *over, aliased=True, **smoothing),
        ]
    for divergence in ("forward_kl", "jsd"):
        variants += [
            _kd("fp32 > bf16, prefix", divergence, *over, aliased=True, vocab_map="prefix", ce_sum="own"),
            _kd("fp32 > bf16, index map, smoothing, softcaps", divergence, *over, aliased=True, **index),
        ]
    return [
        *variants,
        _kd("fp32 in place", "forward_kl", "fp32", "fp32", "fp32", **plain),
        _kd("fp32 values, CE", "jsd", "fp32", "fp32", "fp32", write_grad=False),
        _kd("bf16, ragged, biases", "forward_kl", "bf16", "bf16", "bf16", **biases, **ragged),
        _kd("fp32 > bf16, ragged, smoothing", "skew_reverse_kl", *over, aliased=True, **smoothing, **ragged),
        _kd("fp32 and bf16", "forward_kl", "fp32", "bf16", "fp32"),
        _kd("fp32, ragged, CE", "reverse_kl", "fp32", "fp32", "fp32", **ragged),
        _tile("statistics", "forward_kl"),
        _tile("statistics", "forward_kl", HAS_TEACHER=False),
        _tile("sums", "skew_kl"),
        _tile("sums", "alpha_beta"),
        _tile("gradient", "decoupled", has_smoothing=True, student_transform="softcap"),
        _tile("gradient", "forward_kl", HAS_TEACHER=False),
        Variant(
            "row_statistics fp32",
            "row_statistics",
            {"logits": "fp32"},
            {"AT_ONE": True, "HAS_ROW_WEIGHT": True},
        ),
        _mse("fp32", HAS_BIAS=True),
        _mse("fp32", WRITE_GRAD=False, HAS_ROW_WEIGHT=False),
        _mse("fp32", aligned=False, wide=False, HAS_BIAS=True),
    ]


def _tile(work: str, divergence: str, HAS_TEACHER: bool = True, **rest: Any) -> Variant:
    """A tile of an fp32 buffer, its gradient in bf16 over it; strides of a whole buffer, an odd number of columns."""
    words = f"tile {work}" + ("" if HAS_TEACHER else " without a teacher")
    write = {"write_grad": True, "aliased": True} if work == "gradient" else {"write_grad": False}
    flags = _flags(divergence, ce_sum="own", **write, **rest)
    dtypes = {"student": "fp32", "teacher": "fp32", "grad": "bf16" if work == "gradient" else "fp32"}
    constants = {"PASS": work, "HAS_TEACHER": HAS_TEACHER, "ADD_VALUE": False, "FLAGS": flags}
    return Variant(f"{divergence} {words}", "tile", dtypes, constants, aligned=HAS_TEACHER, wide=HAS_TEACHER)


def _sparse_gradient() -> Variant:
    flags = {"AT_ONE": True, "HAS_CONSTANT": True, "ALIASED": True}
    return Variant(
        "softmax_gradient fp32 > bf16 over it", "softmax_gradient", {"logits": "fp32", "grad": "bf16"}, flags
    )


def _mse(prediction: str, target: str = "bf16", **rest: Any) -> Variant:
    off = dict.fromkeys(("HAS_BIAS", "ALIASED"), False)
    flags = {**off, "HAS_ROW_WEIGHT": True, "WRITE_GRAD": True}
    options = {key: rest.pop(key) for key in ("aligned", "wide") if key in rest}
    words = [key.lower() for key, value in rest.items() if value is True]
    words += ["ragged"] if options.get("aligned") is False else []
    words += [f"no {key.lower()}" for key, value in rest.items() if value is False]
    name = f"mse {prediction} and {target} {', '.join(words)}".strip()
    return Variant(name, "mse_rows", {"prediction": prediction, "target": target}, flags | rest, **options)


def compile_variant(variant: Variant, architecture: str) -> Any:
    """Triton's compiled kernel, launched as the back end would launch it on that architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdkernels._triton import projection
    from kdkernels._triton.kd import rows, softmax, tiles
    from kdkernels._triton.launch import launch_options, row_config

    kernels: dict[str, Any] = {
        "kd_rows": rows._kd_rows_kernel,
        "tile": tiles._tile_kernel,
        "row_statistics": softmax._row_statistics_kernel,
        "softmax_gradient": softmax._softmax_gradient_kernel,
        "mse_rows": projection._mse_rows_kernel,
    }
    kernel = kernels[variant.kernel]
    config = row_config(architecture)
    constants = variant.flags | {"BLOCK": config.block, "WIDTH": config.width}
    fixed = {"labels": "i64", "map": "i32"}
    # A bias has the dtype of its head, which in the linear loss is the dtype that the gradient is written in.
    biases = dict.fromkeys(("student_bias", "teacher_bias", "bias"), variant.dtypes.get("grad", "fp32"))
    pointers = fixed | biases | variant.dtypes
    unspecialized = ("R", "offset", "stride_state_row")
    size, stride = 16 if variant.aligned else 1, 16 if variant.aligned or variant.padded else 1
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{pointers.get(name.removesuffix('_ptr'), 'fp32')}"
            if not kernel.params[place].do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in unspecialized:
            signature[name] = "i32"
        elif name.startswith("stride") or name in ("V", "V_teacher", "shared", "C", "D"):
            signature[name] = "i32"
            if (stride if name.startswith("stride") else size) == 16:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    lean = variant.kernel != "tile" and (
        "FLAGS" not in variant.flags or variant.flags["FLAGS"].fits_default_registers
    )
    return triton.compile(
        source, target=target, options=launch_options(config, size, stride, fits_default_registers=lean)
    )


def _cuobjdump(cubin: Path, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> list[tuple[int, str, str, str]]:
    """(address, predicate, opcode, operands) of every instruction of a disassembly."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)([^;]*);", code)
    return [(int(address, 16), predicate, opcode, rest) for address, predicate, opcode, rest in found]


def _bits(opcode: str) -> int:
    bits = re.search(r"\.(256|128|64|U16|S16|U8|S8)\b", opcode)
    return int(bits[1].strip("US")) if bits else 32


def _full_tiles(code: str) -> tuple[int, float]:
    """Instructions and bytes of global memory of one turn of each loop whose loads ask no mask, summed.

    Tails are masked, and the loop that writes zeros over a row that does not count loads nothing.
    """
    instructions = _instructions(code)
    total, moved = 0, 0.0
    for address, _, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if not opcode.startswith("BRA") or target is None or int(target[1], 16) >= address:
            continue
        body = [part for part in instructions if int(target[1], 16) <= part[0] <= address]
        loads = [part for part in body if part[2].startswith("LDG")]
        if loads and not any(predicate for _, predicate, _, _ in loads):
            total += len(body)
            stores = [part for part in body if part[2].startswith("STG")]
            moved += sum(_bits(opcode) / 8 for _, _, opcode, _ in loads + stores)
    return total, moved


def count(variant: Variant, architecture: str) -> Counts:
    """Compile and count."""
    compiled = compile_variant(variant, architecture)
    from kdkernels._triton.launch import row_config

    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    per_column = (0.0, 0.0)
    if architecture.startswith("sm_"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            code, usage = _cuobjdump(cubin, "--dump-sass"), _cuobjdump(cubin, "-res-usage")
        opcodes = [opcode for _, _, opcode, _ in _instructions(code)]
        for opcode in opcodes:
            kind = {"LDG": "load", "STG": "store"}.get(opcode.split(".")[0])
            if kind is not None:
                widths[kind][_bits(opcode)] += 1
        config = row_config(architecture)
        columns = config.block // (32 * config.num_warps)
        per_column = tuple(number / columns for number in _full_tiles(code))
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
    return Counts(
        variant.name, architecture, registers, shared, spills, instructions, loads, stores, *per_column
    )


def table(counts: list[Counts]) -> str:
    """The counts as lines of a Markdown table."""
    lines = [
        "| variant | arch | registers | shared B | spill B | instr | instr/column | B/column | loads | stores |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in counts:
        loads, stores = (
            " ".join(f"{n}x{bits}" for bits, n in widths.items()) for widths in (row.loads, row.stores)
        )
        lines.append(
            f"| {row.variant} | {row.architecture} | {row.registers} | {row.shared} | {row.spills} | "
            f"{row.instructions} | {row.instructions_per_column:.0f} | {row.bytes_per_column:g} | {loads} | {stores} |"
        )
    return "\n".join(lines)


def work(portion: int, portions: int, architectures: Sequence[str]) -> list[tuple[Variant, str]]:
    """One portion of what the test compiles: everything for sm_90, the main variants for the rest of NVIDIA's."""
    everything = []
    for architecture in architectures:
        chosen = main_variants() if architecture.startswith("sm_") else main_variants()[:3]
        chosen += other_variants() if architecture == "sm_90" else []
        everything += [(variant, architecture) for variant in chosen]
    return everything[portion::portions]


if __name__ == "__main__":
    if sys.argv[1] == "--portion":
        for variant, architecture in work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]):
            print(json.dumps(asdict(count(variant, architecture))), flush=True)
    else:
        chosen = [(variant, name) for name in sys.argv[1:] for variant in main_variants() + other_variants()]
        print(table([count(variant, architecture) for variant, architecture in chosen]))
