"""The fast back ends of `contextual_relation_loss` against float64: hard features, dtypes, blocks, autograd, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.contextual import Case, make_inputs
from benchmarks.contextual_numerics import KINDS
from kdkernels import contextual_relation_loss
from kdkernels._torch import contextual as torch_windows
from kdkernels.options import Impl
from kdkernels.reference.relation_counts import Variant
from tests.support.budget import assert_within_budget
from tests.support.inputs import DEVICE, FAST_IMPLS
from tests.support.rounding import truths

ROOT = Path(__file__).resolve().parents[2]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def solve(student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = contextual_relation_loss(leaf, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_as_good_as_eager(student: Tensor, teacher: Tensor, *, impl: Impl, window: int, **options) -> None:
    ours = solve(student, teacher, impl=impl, window=window, **options)
    wide = student.double(), teacher.double()
    truth = truths(lambda: solve(*wide, impl="reference", window=window, **options))
    for name, actual, exact in zip(("loss", "gradient"), ours, truth, strict=True):
        assert_within_budget(actual, exact, name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_hard_features_in_float32(kind: str) -> None:
    teacher, student = normal(2, 3, 48, 48), normal(2, 3, 48, 32)
    assert_as_good_as_eager(KINDS[kind](student), teacher, impl="torch", window=4, layer_weight=0.5)
    assert_as_good_as_eager(student, KINDS[kind](teacher), impl="torch", window=4, layer_weight=0.5)


@pytest.mark.parametrize(
    "kind", ["a common offset of 100", "few near-duplicates, at 1e-3", "a third near-duplicates, equal"]
)
def test_hard_features_in_the_kernels(kind: str) -> None:
    pytest.importorskip("triton")
    student = KINDS[kind](normal(1, 2, 16, 32))
    assert_as_good_as_eager(student, normal(1, 2, 16, 48), impl="triton", window=3)


# Wide enough for the rounding of long products to show, and a student near its teacher.
@pytest.mark.parametrize(("impl", "length"), [("torch", 96), ("triton", 16)])
def test_wide_features_of_a_student_near_its_teacher(impl: Impl, length: int) -> None:
    student, teacher = make_inputs(Case(1, 1 if impl == "triton" else 3, length, 256, 512, device=DEVICE))
    assert_as_good_as_eager(student, teacher, impl=impl, window=3)
    if impl == "torch":
        options = {"window": 3, "layer_weight": 0.5, "variant": "official"}
        assert_as_good_as_eager(student, teacher, impl=impl, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_half_precision_is_computed_in_float32(impl: Impl, dtype: torch.dtype) -> None:
    """Features are taken as they are; only the gradient is rounded, once, to their dtype."""
    batch = 1 if impl == "triton" else 6
    student, teacher = normal(batch, 2, 14, 8).to(dtype), normal(batch, 2, 14, 6).to(dtype)
    mask = torch.rand(batch, 14, device=DEVICE) < 0.8
    options = {"window": 2, "mask": mask, "layer_weight": 0.5}
    loss, gradient = solve(student, teacher, impl=impl, **options)
    expected, expected_gradient = solve(student.float(), teacher.float(), impl="reference", **options)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    # The teacher's dtype may differ.
    mixed, _ = solve(student.float(), teacher, impl=impl, **options)
    torch.testing.assert_close(mixed, expected)


# Blocks: whole samples, some sequences of one, parts of one sequence, parts with all of it around.
@pytest.mark.parametrize(
    ("shape", "window", "rows"),
    [((5, 2, 24), 2, 96), ((2, 5, 24), 2, 48), ((1, 2, 90), 3, 32), ((1, 2, 70), 40, 32)],
    ids=str,
)
@pytest.mark.parametrize("variant", ["study", "official"])
def test_blocks_do_not_show(
    variant: Variant, shape: tuple[int, int, int], window: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_windows, "BLOCK_ROWS", rows)
    monkeypatch.setattr("kdkernels.features.contextual.blocks.MIN_ROWS", 32)
    assert_equal_in_float64(shape, window, variant)


def assert_equal_in_float64(shape: tuple[int, int, int], window: int, variant: Variant) -> None:
    """The torch back end does the specification's sums in another order, with and without a mask."""
    student, teacher = normal(*shape, 6).double(), normal(*shape, 7).double()
    for mask in (None, torch.rand(shape[0], shape[2], device=DEVICE) < 0.8):
        options = {"window": window, "mask": mask, "layer_weight": 0.5, "variant": variant}
        ours = solve(student, teacher, impl="torch", **options)
        expected = solve(student, teacher, impl="reference", **options)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Tiles of pairs: several sequences at a time, one, and parts of one, in windows within and beyond it.
@pytest.mark.parametrize(
    ("shape", "window", "scratch"),
    [((2, 3, 10), 3, 1 << 19), ((2, 3, 23), 9, 1 << 11), ((1, 1, 37), 16, 256), ((1, 2, 21), 30, 256)],
    ids=str,
)
@pytest.mark.parametrize("variant", ["study", "official"])
def test_tiles_of_pairs_do_not_show(
    variant: Variant,
    shape: tuple[int, int, int],
    window: int,
    scratch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdkernels.features.contextual.blocks.MIN_ROWS", 1 << 30)
    monkeypatch.setattr("kdkernels.features.contextual.blocks.TILE_SCRATCH", (scratch, scratch))
    monkeypatch.setattr("kdkernels.features.contextual.pair_tiles.MIN_TILE", 4)
    assert_equal_in_float64(shape, window, variant)


@pytest.mark.parametrize("kind", list(KINDS))
def test_hard_features_in_tiles_of_pairs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdkernels.features.contextual.blocks.MIN_ROWS", 1 << 30)
    teacher, student = normal(2, 2, 32, 48), normal(2, 2, 32, 32)
    assert_as_good_as_eager(KINDS[kind](student), teacher, impl="torch", window=8, layer_weight=0.5)
    assert_as_good_as_eager(student, KINDS[kind](teacher), impl="torch", window=8, layer_weight=0.5)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_any_strides(impl: Impl) -> None:
    shape = (1, 2, 6) if impl == "triton" else (2, 3, 9)
    student, teacher = normal(*shape, 6), normal(*shape, 5)
    options = {"window": 2, "layer_weight": 0.5, "impl": impl}
    expected = solve(student, teacher, **options)
    for strided_s, strided_t in (
        (student.transpose(1, 2).contiguous().transpose(1, 2), teacher.mT.contiguous().mT),
        (torch.cat([student, student], -1)[..., :6], teacher[:, :, :, [0]].expand_as(teacher)),
    ):
        leaf = strided_s.detach().requires_grad_()
        loss = contextual_relation_loss(leaf, strided_t, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        if strided_t.stride(3) != 0:
            torch.testing.assert_close((loss, gradient), expected)
            continue
        others = solve(student, strided_t.contiguous(), **options)
        torch.testing.assert_close((loss, gradient), others)


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_autograd_is_not_surprised(impl: Impl) -> None:
    student, teacher = normal(1, 2, 12, 6).requires_grad_(), normal(1, 2, 12, 5)
    loss = contextual_relation_loss(student, teacher, window=2, impl=impl)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    second = torch.autograd.grad(loss, student, torch.tensor(-3.0, device=DEVICE), create_graph=True)[0]
    torch.testing.assert_close(second, -3.0 * first)
    with pytest.raises(RuntimeError, match="kdkernels losses have no second derivative"):
        torch.autograd.grad(second.sum(), student)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(contextual_relation_loss(student, teacher, window=2, impl=impl), loss)
    assert not contextual_relation_loss(student.detach(), teacher, window=2, impl=impl).requires_grad


def test_a_call_is_one_node_of_a_compiled_graph() -> None:
    student, teacher = normal(2, 3, 12, 6).requires_grad_(), normal(2, 3, 12, 5)
    mask = torch.arange(12, device=DEVICE) < torch.tensor([[12], [7]], device=DEVICE)

    def loss(student: Tensor) -> Tensor:
        return 2.0 * contextual_relation_loss(student, teacher, window=2, mask=mask, layer_weight=0.5)

    plain = loss(student)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, student), torch.autograd.grad(plain, student), rtol=1e-6, atol=1e-9
    )


def test_the_kernels_agree_with_the_torch_back_end_on_wide_windows() -> None:
    """Windows and widths beyond one tile of every kernel."""
    pytest.importorskip("triton")
    student, teacher = normal(1, 1, 38, 40), normal(1, 1, 38, 33)
    student[:, :, 3] = student[:, :, 4]
    mask = torch.arange(38, device=DEVICE).unsqueeze(0) != 17
    options = {"window": 9, "mask": mask}
    kernels = solve(student, teacher, impl="triton", **options)
    expected = solve(student, teacher, impl="torch", **options)
    for one, other in zip(kernels, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_other_devices_take_every_row_the_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the torch back end does where counting nearly equal rows would make the host wait, run on this one."""
    monkeypatch.setattr(torch_windows, "direct_rows", torch.ones_like)
    student, teacher = normal(2, 2, 20, 6), normal(2, 2, 20, 7)
    mask = torch.rand(2, 20, device=DEVICE) < 0.8
    options = {"window": 3, "mask": mask, "layer_weight": 0.5}
    ours = solve(student, teacher, impl="torch", **options)
    expected = solve(student, teacher, impl="reference", **options)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


PEAK = """
import json, sys, torch
sys.path[:0] = [{root!r}, {kernels!r}]
from benchmarks.measure import peak_bytes_of
from kdkernels import contextual_relation_loss
torch.manual_seed(0)
found = {{}}
# Narrow and wide windows, a band as wide as fits, a whole sequence, a single sequence; the official variant.
for shape, width, window, variant in (
    ((8, 4, 64, 2048), 256, 3, "study"),
    ((8, 4, 64, 2048), 256, 20, "study"),
    ((8, 4, 256, 512), 768, 50, "study"),
    ((8, 2, 128, 2048), 768, 128, "study"),
    ((8, 2, 256, 1024), 768, 100, "study"),
    ((8, 2, 256, 512), 768, 10, "official"),
):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(*shape[:3], width)
    def step():
        student.grad = None
        contextual_relation_loss(student, teacher, window=window, variant=variant).backward()
    # The first round is for what comes once: pages of code, and what the allocator keeps.
    for _ in range(2):
        student.grad = None
        found[str((shape, window, variant))] = peak_bytes_of(step) / (4 * student.numel())
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
def test_extra_memory_is_at_most_two_students() -> None:
    """Beyond the inputs, with the gradient, for narrow and wide windows; in a process of its own."""
    program = PEAK.format(root=str(ROOT), kernels=str(ROOT / "kernels"))
    # Blocks of 64 KiB and more go back to the system when they are freed, so that old ones are not counted.
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert max(found.values()) <= 2.0, found
