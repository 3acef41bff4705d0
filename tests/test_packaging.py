"""The shape of the source tree: what imports what, what a bare import costs, how long the files are."""

import ast
import importlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"kdkernels": ROOT / "kernels", "kdtrain": ROOT}
OURS = {"kdkernels", "kdtrain", "kernels", "tests", "benchmarks"}

# What each folder of kdkernels may import of the others. The modules beside the folders are the specifications, except
# `modules` and the package itself, which offer the losses. A back end is reached through `core.backend` only.
MAY_IMPORT = {
    "specifications": set[str](),
    "core": {"specifications"},
    "reference": {"specifications", "core"},
    "logits": {"specifications", "core", "reference"},
    "features": {"specifications", "core", "reference"},
    "_torch": {"specifications", "core"},
    "_triton": {"specifications", "core"},
    "offered": {"specifications", "logits", "features"},
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


def folder(module: str) -> str:
    """The folder of a module of kdkernels, by its key in `MAY_IMPORT`."""
    inner = module.removeprefix("kdkernels").removeprefix(".")
    if inner in ("", "modules"):
        return "offered"
    first = inner.partition(".")[0]
    return first if (ROOT / "kernels" / "kdkernels" / first).is_dir() else "specifications"


@pytest.mark.parametrize("name", [name for name in ALL_MODULES if is_inside(name, "kdkernels")])
def test_kdkernels_imports_point_one_way(name: str) -> None:
    own = folder(name)
    for module, _ in imports(name, ALL_MODULES[name]):
        top = module.partition(".")[0]
        if top == "triton":
            assert own == "_triton", f"{name} imports triton outside the triton back end"
        elif top == "kdkernels":
            assert folder(module) in MAY_IMPORT[own] | {own}, f"{name} must not import {module}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{name} imports {module}"


def test_kdkernels_has_no_import_circle() -> None:
    """Imports inside functions count too: a module can be read once all that it imports has been read."""
    names = {name for name in ALL_MODULES if is_inside(name, "kdkernels")}
    order = TopologicalSorter(
        {name: {module for module, _ in imports(name, ALL_MODULES[name])} & names for name in names}
    )
    order.prepare()  # raises CycleError, which names the circle


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
