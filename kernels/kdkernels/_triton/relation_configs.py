"""Launch configurations of the relation kernels, chosen by compiled-code counts (docs/log.md), not yet timed on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RelationConfig:
    """block_m: tokens of a program. block_n: tokens they are compared with at a time. Powers of two from 16."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded(width: int) -> int:
    """Columns of a tile that holds heads of this width: the next power of two, at least the 16 that a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def relation_config(width: int, half: bool, architecture: str) -> RelationConfig:
    """For heads padded to `width` columns, half or full precision, on an architecture as `architecture_of` names it."""
    if architecture == "interpreter":
        return RelationConfig(32, 32, 1, 1)
    if not half:
        block = 32 if width <= 128 else 16
        return RelationConfig(block, block, 4, 1)
    if width <= 64:
        return RelationConfig(64, 64, 4, 2)
    if width <= 128:
        return RelationConfig(64, 64, 8, 2)
    return RelationConfig(64, 32, 8, 1)


def dot_precision(architecture: str) -> str:
    """How float32 features are multiplied: on NVIDIA by three products of tensor cores, which keep float32's digits."""
    if architecture == "interpreter":
        return architecture
    return "tf32x3" if architecture.startswith("sm_") else "ieee"
