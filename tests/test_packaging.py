"""The shape of the source tree: what imports what, what a bare import costs, how long the files are."""

import ast
import importlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"kdkernels": ROOT / "kernels", "kdtrain": ROOT}
OURS = {"kdkernels", "kdtrain", "kernels", "tests", "benchmarks"}

# What each module of kdkernels may import of kdkernels. The public side (`logit_losses`, `linear_losses`,
# `feature_losses`, `modules` and the package itself) is not named here: it may import all of these, but reaches a back end
# only through `backends`, which loads the one that is asked for.
FOUNDATIONS = {
    "divergences": set[str](),
    "matmul": set[str](),
    "counting": set[str](),
    "options": {"divergences"},
    "teachers": {"options"},
    "compiling": {"divergences", "stats", "teachers", "traced"},
    "traced": {"autograd", "compiling", "matmul", "options"},
    "checks": {"options", "divergences", "teachers", "compiling", "counting"},
    "logit_checks": {"checks", "options", "teachers"},
    "teacher_checks": {"checks", "compiling", "divergences", "logit_checks", "options", "teachers"},
    "prepare": {
        "backends",
        "checks",
        "counting",
        "divergences",
        "logit_checks",
        "matmul",
        "options",
        "teacher_checks",
        "teachers",
    },
    "stats": {"options"},
    "finite": {"compiling", "prepare", "reference", "teachers"},
    "reference": {"options", "divergences", "matmul"},
    "reference_sparse": {"options", "reference", "teachers"},
    "reference_rows": {"prepare", "reference", "reference_sparse", "teachers"},
    "backends": {"options"},
    "autograd": {"compiling", "options", "traced"},
    "two_way": set[str](),
    "tile_state": set[str](),
    "tiles": {"divergences", "options", "tile_state", "two_way"},
    "sharded": {
        "autograd",
        "backends",
        "counting",
        "matmul",
        "options",
        "teacher_rows",
        "tile_state",
        "tiles",
    },
    "low_memory": {
        "autograd",
        "backends",
        "counting",
        "matmul",
        "options",
        "teacher_rows",
        "tile_state",
        "tiles",
    },
    "sparse": {"backends", "matmul", "options", "teachers"},
    "teacher_rows": {"autograd", "backends", "matmul", "options", "sparse", "teachers"},
    "chunked": {"autograd", "backends", "counting", "matmul", "options", "teacher_rows", "teachers"},
    "windows": set[str](),
    "pairs": {"options"},
    "reference_contextual": {"matmul", "reference_features", "windows"},
    "pair_tiles": {"pairs"},
    "angle_tiles": {"options", "pair_tiles", "pairs"},
    "window_backend": {"pairs"},
    "window_blocks": {
        "angle_tiles",
        "autograd",
        "backends",
        "matmul",
        "options",
        "pair_tiles",
        "pairs",
        "window_backend",
        "windows",
    },
    "_torch": {"_torch", "matmul", "options", "divergences", "tile_state", "two_way", "pairs", "windows"},
    "_triton": {"_triton", "options", "divergences", "pairs", "tile_state", "windows"},
}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package: dotted name to file."""
    root = SOURCE_ROOTS[package]
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL_MODULES = {name: path for package in SOURCE_ROOTS for name, path in modules(package).items()}


def imports(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of a module, inside functions too: (module, imported name or None), relative ones resolved."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")
                base = ".".join(
                    [*anchor[: len(anchor) - node.level + 1], *([node.module] if node.module else [])]
                )
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole, None) if whole in ALL_MODULES else (base, alias.name)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def run_fresh(program: str, *flags: str) -> str:
    """Run a program in a new interpreter with the repository root first on its path."""
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n{program}"
    done = subprocess.run(
        [sys.executable, *flags, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_source_root_is_not_a_package() -> None:
    """A package importable as `kernels` breaks transformers for everyone who has Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert run_fresh("import kernels; print(kernels.__file__)") == "None"


def test_transformers_models_import_from_the_repository_root() -> None:
    pytest.importorskip("transformers")
    names = "RobertaForSequenceClassification, LlamaForCausalLM"
    program = f"from transformers import {names}\nprint(*[model.__name__ for model in ({names})], sep=', ')"
    assert run_fresh(program) == names


def test_importing_the_losses_is_cheap() -> None:
    """`import kdkernels` brings in torch and nothing else that is not in the standard library."""
    program = (
        "import torch\nbefore = set(sys.modules)\nimport kdkernels\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
        "print(*sorted(sys.modules))"
    )
    new, everything = run_fresh(program).split("\n")
    assert set(new.split()) - set(sys.stdlib_module_names) <= {"kdkernels", "torch"}
    assert not {"triton", "transformers", "kdtrain"} & set(everything.split())


@pytest.mark.parametrize("name", [name for name in ALL_MODULES if is_inside(name, "kdtrain")])
def test_kdtrain_uses_public_names_of_kdkernels_only(name: str) -> None:
    public = importlib.import_module("kdkernels").__all__
    for module, imported in imports(name, ALL_MODULES[name]):
        if is_inside(module, "kdkernels"):
            assert module == "kdkernels", f"{name} imports {module}, a private module of kdkernels"
            assert imported is None or imported in public, f"{name} imports the private kdkernels.{imported}"


@pytest.mark.parametrize("name", [name for name in ALL_MODULES if is_inside(name, "kdkernels")])
def test_kdkernels_imports_point_one_way(name: str) -> None:
    part = name.removeprefix("kdkernels").removeprefix(".").partition(".")[0]
    for module, _ in imports(name, ALL_MODULES[name]):
        top, _, inner = module.partition(".")
        if top == "triton":
            assert part == "_triton", f"{name} imports triton outside the triton back end"
        elif top == "kdkernels":
            imported = inner.partition(".")[0]
            if part in FOUNDATIONS:
                assert imported in FOUNDATIONS[part], f"{name} must not import {module}"
            else:
                assert imported not in ("_torch", "_triton"), f"{name} must not import {module}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", list(ALL_MODULES))
def test_nothing_imports_tests_or_benchmarks(name: str) -> None:
    for module, _ in imports(name, ALL_MODULES[name]):
        top = module.partition(".")[0]
        assert top not in OURS - {"kdkernels", "kdtrain"}, f"{name} imports {module}"
        assert not (top == "kdtrain" and is_inside(name, "kdkernels")), f"{name} imports {module}"


@pytest.mark.parametrize("name", list(ALL_MODULES))
def test_every_module_and_public_name_is_documented(name: str) -> None:
    tree = ast.parse(ALL_MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name} has no docstring"
    for node in tree.body:
        overload = any(
            isinstance(mark, ast.Name) and mark.id == "overload"
            for mark in getattr(node, "decorator_list", ())
        )
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not overload
        ):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


@pytest.mark.parametrize("package", list(SOURCE_ROOTS))
def test_all_names_what_the_package_offers(package: str) -> None:
    offered = importlib.import_module(package)
    assert len(set(offered.__all__)) == len(offered.__all__)
    for name in offered.__all__:
        assert hasattr(offered, name), f"{package}.__all__ names {name}, which does not exist"


@pytest.mark.parametrize("package", list(SOURCE_ROOTS))
def test_files_stay_short(package: str) -> None:
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(package).items()
    }
    longest = max(lines, key=lambda name: lines[name])
    assert lines[longest] <= 500, f"{longest} has {lines[longest]} lines: split it"
    assert statistics.median(lines.values()) < 200
