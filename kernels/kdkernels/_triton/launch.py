"""Launch configurations: one frozen table, nothing is tuned at run time.

The row kernels write in place, so an autotuner that ran one twice would feed it its own output.
Chosen by compiled-code counts (registers, spills, widths of loads) on 2026-11-22, not yet timed on a GPU; dev/LOG.md
has the counts of the configurations that lost.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..core.rows import equal_chunk, rows_in


@dataclass(frozen=True)
class RowConfig:
    """How one program walks a row.

    block: columns of a tile. width: neighbouring columns of a tile that are reduced first; 8 of them are one 128-bit
    load of halves or two of fp32, all in one thread. num_warps: warps of a program. All powers of two, width < block.
    registers: how many a thread may have where the code is not fits_default_registers or the sizes of a row are not multiples of 16; None
    leaves the choice to the compiler. NVIDIA's aims at 64 or 80, and around the narrow loads of a ragged tail, or with a
    dozen numbers of the row to keep, it then spills a word now and then. Half as many more where both come together.
    """

    block: int
    width: int
    num_warps: int
    registers: int | None = None


# 8 columns of each side a thread in every row of the table: 16 need twice the registers and halve the warps in flight.
_NVIDIA = RowConfig(block=2048, width=8, num_warps=8, registers=128)
_AMD = RowConfig(block=4096, width=8, num_warps=8)  # warps of 64

# Bytes of a chunk's two fp32 logit buffers, largest first, and the rows below which the heads are read too often. Each chunk
# reads both heads again, and reads and writes the gradient of one in fp32: dev/LOG.md has the bytes by size of chunk.
CHUNK_BYTES = (2**32, 2**31, 2**30)
MIN_CHUNK_ROWS = 1024
CHUNK_ROWS_STEP = 256


def row_config(architecture: str) -> RowConfig:
    """Configuration of the row kernels on an architecture as `architecture_of` names it."""
    return _AMD if architecture.startswith("gfx") else _NVIDIA


def launch_options(
    config: RowConfig, vocabulary: int, *strides: int, fits_default_registers: bool = True
) -> dict[str, int | bool]:
    """Options of a launch over rows of this size and these strides; lean code is known not to spill when left alone."""
    # Triton 3.10 turns fused multiply-add off by default; these kernels are tested and counted with it.
    options: dict[str, int | bool] = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    narrow = any(stride % 16 for stride in strides)  # rows start anywhere, and are read column by column
    if config.registers is not None and (not fits_default_registers or narrow or vocabulary % 16):
        options["maxnreg"] = (
            config.registers if fits_default_registers or not narrow else config.registers * 3 // 2
        )
    return options


def refuse_float64(**tensors: Tensor) -> None:
    """Raise for the first tensor of float64, by its name."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"the triton back end computes in float32, got {name} in float64; use impl='torch' there"
            )


@lru_cache
def architecture_of(device: torch.device) -> str:
    """The device's architecture as compilers spell it: "sm_90", "gfx942"; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chunk_budget(memory: tuple[int, int] | None) -> int:
    """Bytes of a chunk's two buffers on a device of which (free, all) bytes are known.

    The largest step that leaves fifteen sixteenths of the device, and half of what is free, to others. In steps, so that on
    one kind of device a chunk is the same size, and gradients are the same bits, until memory runs out.
    """
    if memory is None:
        return CHUNK_BYTES[0]
    free, total = memory
    fits = [size for size in CHUNK_BYTES if size <= total // 16 and size <= free // 2]
    return fits[0] if fits else CHUNK_BYTES[-1]


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Free bytes, with those that the allocator holds unused, and all; None where the driver is not to be asked."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None, device: torch.device) -> int:
    """Rows of a token chunk: the byte budget over two fp32 buffers, in equal chunks of whole steps of 256 rows.

    A budget that the caller gives is kept to the row, down to 1: the floor of 1024 guards the default only.
    """
    budget = chunk_budget(device_memory(device)) if chunk_bytes is None else chunk_bytes
    most = rows_in(budget, vocabulary, MIN_CHUNK_ROWS if chunk_bytes is None else 1)
    return equal_chunk(rows, most, CHUNK_ROWS_STEP)
