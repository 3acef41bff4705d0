"""What is shipped: the archives build, the wheel works alone, and the README's code runs."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_LEFTOVERS = {"__pycache__", ".ruff_cache", ".pytest_cache"}

LOSS_STEP = """
import torch, kdkernels
hidden = torch.randn(6, 8, requires_grad=True)
weight = torch.randn(50, 8, requires_grad=True)
teacher = kdkernels.TeacherHead(torch.randn(6, 16), torch.randn(50, 16))
labels = torch.tensor([1, 2, -100, 3, 4, 49])
loss = kdkernels.linear_kd_loss(hidden, weight, teacher, labels, ce_weight=0.5, temperature=2.0)
loss.backward()
assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0
assert not hidden.grad[2].any()
import sys
assert not {"numpy", "transformers", "datasets", "triton", "kdtrain"} & set(sys.modules), sorted(sys.modules)
print(kdkernels.__file__)
"""


def build(kind: str, source: Path, out: Path) -> Path:
    """Build one archive with the installed hatchling, without a build environment and so without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return archive


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, out)) as archive:
        archive.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist and not from the tree, so that a file missing from the sdist is missed here."""
    return build("wheel", unpacked_sdist, tmp_path_factory.mktemp("wheel"))


def shipped_files(package: Path) -> set[str]:
    """Every file of a package's folder, as the wheel names it: code, markers, weights, tables."""
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and not BUILD_LEFTOVERS & set(path.parts)
    }


def test_the_sdist_carries_the_house(unpacked_sdist: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"):
        assert (unpacked_sdist / name).is_file(), name
    for folder in ("kernels/kdkernels", "kdtrain", "tests", "benchmarks"):
        assert list((unpacked_sdist / folder).glob("*.py")), folder
    assert not (unpacked_sdist / ".venv").exists()


def test_the_wheel_carries_both_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "kdtrain = kdtrain.cli:main" in archive.read(entry_points).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == shipped_files(ROOT / "kernels" / "kdkernels") | shipped_files(ROOT / "kdtrain")
    assert {"kdkernels/py.typed", "kdtrain/py.typed"} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


def torch_alone(site: Path) -> None:
    """Fill a folder with links to torch and what torch itself requires, so that nothing else can be imported."""
    waiting, seen = ["torch"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement for another platform or Python
        # The CUDA build of torch requires triton, which torch imports by itself and the losses must do without.
        required = [line for line in found.requires or [] if "extra ==" not in line]
        waiting += [
            match[0].lower()
            for line in required
            if (match := re.match(r"[\w.-]+", line)) and match[0] != "triton"
        ]
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(found.locate_file(top)))


def test_the_wheel_alone_runs_a_loss(wheel: Path, tmp_path: Path) -> None:
    """No extras, no numpy, no transformers, no repository: torch and the wheel."""
    site, alone = tmp_path / "site", tmp_path / "wheel"
    site.mkdir()
    torch_alone(site)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(alone)
    program = f"import sys; sys.path += [{str(alone)!r}, {str(site)!r}]\n{LOSS_STEP}"
    # -I -S: neither this environment's packages nor the working directory are on the path.
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.strip()).is_relative_to(alone)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(python_blocks(ROOT / "README.md"))))
def test_the_code_in_the_readme_runs(number: int) -> None:
    code = compile(python_blocks(ROOT / "README.md")[number], f"README.md, python block {number + 1}", "exec")
    exec(code, {"__name__": "__main__"})


def test_the_readme_shows_code() -> None:
    assert python_blocks(ROOT / "README.md"), "the README lost its examples, so nothing of it is tested"
