"""Launch configurations of the relation kernels, chosen by compiled-code counts (dev/LOG.md), not yet timed on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RelationConfig:
    """block_m: tokens of a program. block_n: tokens they are compared with at a time. Powers of two from 16."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As keywords of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def padded(width: int) -> int:
    """Columns of a tile that holds heads of this width: the next power of two, at least the 16 that a matmul takes."""
    return max(16, 1 << (width - 1).bit_length())


_INTERPRETER = RelationConfig(32, 32, 1, 1)

# By whether features are half precision, whether the kernel writes gradients, and the widest padded head it is for. What
# was compiled and spilled: dev/LOG.md.
_NVIDIA = {
    (True, False, 128): RelationConfig(64, 64, 4, 2),
    (True, False, 256): RelationConfig(64, 32, 8, 1),
    (True, True, 64): RelationConfig(64, 32, 4, 2),
    (True, True, 128): RelationConfig(64, 32, 8, 2),
    (True, True, 256): RelationConfig(32, 32, 8, 1),
    (False, False, 64): RelationConfig(32, 32, 8, 1),
    (False, False, 128): RelationConfig(16, 16, 4, 1),
    (False, True, 64): RelationConfig(32, 32, 4, 1),
    (False, True, 128): RelationConfig(16, 16, 4, 1),
}
_AMD = {
    (True, False, 256): RelationConfig(64, 32, 4, 1),
    (True, True, 128): RelationConfig(64, 16, 4, 1),
    (True, True, 256): RelationConfig(16, 16, 4, 1),
    (False, False, 128): RelationConfig(32, 32, 4, 1),
    (False, True, 128): RelationConfig(16, 16, 4, 1),
}


def widest_head(half: bool) -> int:
    """Columns of the widest head that the table has a configuration for."""
    return max(width for precision, _, width in _NVIDIA if precision is half)


def relation_config(width: int, half: bool, gradient: bool, architecture: str) -> RelationConfig:
    """For heads padded to `width` columns, at most `widest_head`, on an architecture as `architecture_of` names it."""
    if architecture == "interpreter":
        return _INTERPRETER
    table = _AMD if architecture.startswith("gfx") else _NVIDIA
    return table[min(key for key in table if key[:2] == (half, gradient) and key[2] >= width)]
