"""What the programs of tests import, loaded once in the process that they are forks of.

Nothing is computed here: a process that did so may have threads, which a fork would be without.
"""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import sklearn.metrics  # noqa: E402, F401  # transformers imports it with its first model
import torch.distributed.run  # noqa: E402, F401

import kdtrain  # noqa: E402

for _module in pkgutil.walk_packages(kdtrain.__path__, "kdtrain."):
    if not _module.name.endswith("__main__"):
        import_module(_module.name)
