"""Compile the kernels of windows of neighbours without a GPU, and count registers and spills.

python -m tests.support.compiled_windows      # one JSON line a kernel and architecture; needs TRITON_INTERPRET unset
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

# Pointers whose dtype is that of the caller's features, and those that are no float32.
FEATURES = ("features_ptr", "student_ptr", "teacher_ptr")
KINDS = {"counted_ptr": "*i1", "chosen_ptr": "*i1", "valid_ptr": "*i1"}


def variants() -> Iterator[tuple[str, Any, dict[str, int | bool], str]]:
    """Name, kernel, compile-time constants and dtype of the features of everything that is launched."""
    from kdkernels._triton.contextual import angles, direct, products

    tile = {"BLOCK_D": products.BLOCK_D}
    band = tile | {
        "BLOCK_ROWS": products.BLOCK_ROWS,
        "BLOCK_NEIGHBOURS": products.BLOCK_NEIGHBOURS,
        "CENTRED": True,
    }
    with_gradient = {
        "WRITE_GRAD": True,
        "BLOCK_N": direct.BLOCK_NEIGHBOURS,
        "BLOCK_D": direct.BLOCK_D,
    }
    for length in (64, 8):
        constants = tile | {"BLOCK_M": length, "BLOCK_S": products.BLOCK_ROWS // length}
        yield f"means of {length}", products._sequence_means_kernel, constants, "fp32"
    for name, dtype in (("", "fp32"), (" bf16", "bf16"), (" ragged", "fp32")):
        yield f"products{name}", products._band_products_kernel, band, dtype
        yield f"apply{name}", products._band_apply_kernel, band, dtype
        yield f"direct{name}", direct._direct_angles_kernel, with_gradient, dtype
    plain, values = band | {"CENTRED": False}, with_gradient | {"WRITE_GRAD": False}
    yield "products, as they are", products._band_products_kernel, plain, "fp32"
    yield "apply, as they are", products._band_apply_kernel, plain, "fp32"
    yield "direct, values", direct._direct_angles_kernel, values, "fp32"
    for kernel in ("values", "sides", "band"):
        function = getattr(angles, f"_angle_{kernel}_kernel")
        yield f"angle {kernel}", function, {"BLOCK": angles.BLOCK}, "fp32"


def compile_kernel(
    kernel: Any, constants: dict[str, int | bool], dtype: str, architecture: str, ragged: bool
) -> Any:
    """Triton's compiled kernel, for rows that start at multiples of 16 elements unless they are ragged."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdkernels._triton.contextual.direct import DIRECT_OPTIONS
    from kdkernels._triton.contextual.products import OPTIONS

    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in FEATURES else KINDS.get(name, "*fp32")
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name == "shortest":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith(("stride", "D")) and not ragged:
                attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    options = DIRECT_OPTIONS if "WRITE_GRAD" in constants else OPTIONS
    return triton.compile(source, target=target, options=options)


def count(compiled: Any, architecture: str) -> dict[str, int]:
    """Registers a thread, bytes of spills, bytes of shared memory."""
    if architecture.startswith("sm_"):
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = subprocess.run(
                [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
            ).stdout
        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        registers, spills = int(numbers["REG"]), max(int(numbers["STACK"]), int(numbers["LOCAL"]))
    else:
        code = compiled.asm["amdgcn"]
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code))
        scratch = re.search(r"ScratchSize: (\d+)", code)
        assert scratch is not None
        registers = int(numbers["vgpr_count"])
        spills = max(int(scratch[1]), int(numbers["vgpr_spill_count"]), int(numbers["sgpr_spill_count"]))
    return {"registers": registers, "spills": spills, "shared": int(compiled.metadata.shared)}


def main() -> None:
    """Compile everything; one JSON line each."""
    for architecture in ARCHITECTURES:
        for name, kernel, constants, dtype in variants():
            # One architecture sees every variant, the others those of float32 with every flag on.
            if architecture != "sm_90" and any(word in name for word in ("bf16", "ragged", ",", "of 8")):
                continue
            compiled = compile_kernel(kernel, constants, dtype, architecture, "ragged" in name)
            found = count(compiled, architecture)
            print(json.dumps({"kernel": name, "architecture": architecture, **found}), flush=True)


if __name__ == "__main__":
    main()
