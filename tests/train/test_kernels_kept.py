"""Runs in fp32 on a CPU keep few of oneDNN's kernels, so that batches of ever other lengths do not pile them up."""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, torch
from kdtrain.engine.accelerator import start_accelerator
from kdtrain.recipe import TrainingSection

training = TrainingSection(precision=sys.argv[1])
start_accelerator(training)
for _ in range(2):
    for rows in range(1, 41):
        torch.nn.functional.gelu(torch.ones(rows, 64))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(
    ("precision", "kept", "found"), [("fp32", None, 0), ("bf16", None, 40), ("fp32", "64", 40)]
)
def test_kernels_kept(precision: str, kept: str | None, found: int) -> None:
    """Of 40 shapes met twice none is found again; all are where oneDNN's own number, or the user's, holds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    environment |= {"ONEDNN_VERBOSE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    if kept is not None:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = kept
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, precision],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if "eltwise_gelu" in line]
    hits, misses = (sum(f"create:cache_{word}," in line for line in lines) for word in ("hit", "miss"))
    assert (hits, misses) == (found, 80 - found)
