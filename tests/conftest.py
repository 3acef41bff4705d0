"""What holds for every test: the interpreter switch, no network, poisoned scratch memory, fixed seeds.

The environment is set at the top of this file, before anything imports torch, triton or transformers.
"""

import os
import random
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

# One thread a process: sums come out in one order everywhere, and tests that run side by side do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded and nothing is read from or left in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
_hf_home = tempfile.TemporaryDirectory(prefix="kdkernels-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _hf_home.name
# A fork of a process whose tokenizer already started threads would print a warning and run without them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton 3.10 turns fused multiply-add off by default and 3.9 warns of it; a fixed value keeps numbers where they are.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

from tests.support.interpreter import patch_bfloat16_rounding, patch_language_once
from tests.support.ratios import keep_ratios, print_ratios, pytest_addoption

if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could switch its interpreter on.")
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton") is not None:
        patch_language_once()
        patch_bfloat16_rounding()

import pytest

# The dtypes that the packages compute in. Integer scratch stays as it is: NaN has no integer twin that is as loud.
_POISONED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a factory of uninitialised tensors so that what nobody wrote is NaN, and so fails loudly."""

    @wraps(make)
    def make_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        # A graph under trace is left alone: inductor refuses the write, and what runs inside an operator is poisoned.
        if torch.compiler.is_compiling() or made.dtype not in _POISONED or made.layout != torch.strided:
            return made
        made.detach().fill_(float("nan"))  # detached: a leaf that requires grad cannot be filled in place
        return made

    return make_poisoned


__all__ = ["keep_ratios", "pytest_addoption"]  # found here by pytest

# For the whole process and not by fixture: autograd runs backward in threads of its own, and modules that hold
# `torch.empty` by reference are imported once.
for _owner, _names in (
    (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
):
    for _name in _names:
        setattr(_owner, _name, _poison(getattr(_owner, _name)))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _interpreted(items: list[pytest.Item]) -> list[pytest.Item]:
    """Without a GPU, of the combinations that a test marked `interpreted(n)` has for triton every n-th.

    A test without the parameter `impl` is one of triton.

    The interpreter takes about a second for one. Choose n without a divisor in common with the lists of parameters, so
    that every value of each is met.
    """
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        mark = item.get_closest_marker("interpreted")
        if mark is not None and getattr(item, "callspec").params.get("impl", "triton") == "triton":  # noqa: B009
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % mark.args[0]:
                continue
        kept.append(item)
    return kept


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a device where there is none."""
    if not torch.cuda.is_available():
        items[:] = _interpreted(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the kernels' cases that ran below Python, so that the log of a run shows that they did."""
    for name, heading in (
        ("executed_from_ir", "executed from Triton IR"),
        ("executed_from_ptx", "executed from PTX, in several orders of the warps"),
    ):
        cases = [
            value
            for report in terminalreporter.getreports("passed")
            for key, value in report.user_properties
            if key == name
        ]
        if cases:
            terminalreporter.section(f"{heading}: {len(cases)} cases")
            for case in sorted(cases):
                terminalreporter.line(str(case))
    print_ratios(terminalreporter)
