"""What the programs of tests import, loaded once in the process that they are forks of.

Nothing is computed here: a process that did so may have threads, which a fork would be without.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch.distributed.run  # noqa: E402, F401
