"""The reference cannot drift: generated pages equal the code, every field has its sentence, and pages name what files hold."""

import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dev.reference import FOLDER, PAGES
from kdtrain.methods import METHODS
from kdtrain.recipe.base import Section, section_of
from kdtrain.study.plan import StudyRecipe
from kdtrain.summary import Summary
from kdtrain.tasks.recipes import RECIPES
from kdtrain.teacher_cache.store import MEANINGS, StoreSpec

ROOT = Path(__file__).resolve().parents[2]


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    """The class and those of its fields."""
    yield kind
    for field in kind.model_fields.values():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from sections(inner)


ALL = {
    one.__qualname__: one
    for kind in (*RECIPES.values(), StudyRecipe, *(method.Options for method in METHODS.values()))
    for one in sections(kind)
}


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    committed = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    generated = PAGES[name]().splitlines()
    for number, (old, new) in enumerate(zip(committed, generated, strict=False), 1):
        assert old == new, f"docs/reference/{name}:{number} is out of date; run python -m dev.reference"
    assert len(committed) == len(generated), f"docs/reference/{name}:{min(len(committed), len(generated))}"


@pytest.mark.parametrize("kind", ALL.values(), ids=list(ALL))
def test_every_field_has_its_sentence(kind: type[Section]) -> None:
    place = f"{Path(inspect.getfile(kind)).relative_to(ROOT)}:{inspect.getsourcelines(kind)[1]}"
    for name, field in kind.model_fields.items():
        if section_of(field.annotation) is None and not (kind.__name__ == "Options" and name == "name"):
            assert field.description, f"{place}: {kind.__qualname__}.{name} has no description"


def test_the_page_of_the_run_folder_names_every_field_of_the_summary() -> None:
    page = (FOLDER / "run-folder.md").read_text(encoding="utf-8")
    missing = [one.name for one in fields(Summary) if f"`{one.name}`" not in page]
    assert not missing


def test_the_page_of_the_store_names_every_field_of_the_manifest() -> None:
    page = (FOLDER / "store-format.md").read_text(encoding="utf-8")
    names = {*MEANINGS, *(one.name for one in fields(StoreSpec))}
    assert not [name for name in names if f"| `{name}` |" not in page]
