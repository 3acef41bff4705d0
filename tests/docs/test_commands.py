"""Commands and recipes in README and docs: every command line parses, and every YAML block is a recipe or fits into one."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdtrain.cli import COMMANDS, add_arguments, command_parsers, split_overrides
from kdtrain.errors import KdtrainError
from kdtrain.recipe.load import parse_overrides, read_yaml, set_field
from kdtrain.study.plan import study_from_dict, unfold
from kdtrain.tasks.recipes import recipe_from_dict

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEACHER = {"teacher": {"path": "teacher"}, "method": {"name": "kd"}}
BASES: tuple[dict[str, Any], ...] = (
    {"task": "classification", "data": {"path": "data"}, **TEACHER},
    {"task": "classification", "data": {"train": "data.jsonl", "classes": ["a", "b"]}, **TEACHER},
    {"task": "code_lm", "data": {"train": "data"}, "student": {"path": "student"}, **TEACHER},
    {"task": "masked_lm", "data": {"train": ["data"]}},
)
"""A part of a recipe on a page is put over these."""


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start(1)) + 1
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def commands(block: str) -> list[list[str]]:
    """What follows `kdtrain` in each line of a shell block."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "kdtrain" in words and not words[0].startswith("docker"):
            found.append(words[words.index("kdtrain") + 1 :])
    return found


def check_recipe(content: dict[str, Any]) -> None:
    if content.get("task") == "study":
        unfold(study_from_dict(content))
    else:
        recipe_from_dict(content)


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_parse(block: str) -> None:
    for name, *words in commands(block):
        if name == "--version":
            continue
        assert name in COMMANDS, f"kdtrain {name}"
        parser, parsers = command_parsers()
        add_arguments(name, parsers[name])
        overrides: list[str] = []
        if COMMANDS[name].recipe:
            words, overrides = split_overrides(words, parsers[name].names)
        if "--help" in words:
            continue
        arguments = parser.parse_args([name, *words])  # exits with an error when an option is unknown
        recipe = ROOT / str(getattr(arguments, "recipe", ""))
        if recipe.is_file():
            check_recipe(read_yaml(recipe, overrides))
        else:  # the fields of the reader's own recipe
            content: dict[str, Any] = {}
            for field, value in parse_overrides(overrides):
                set_field(content, field, value)
            fits(content)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        inner = result.get(name)
        both = isinstance(inner, dict) and isinstance(value, dict) and name != "method"
        result[name] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def fits(part: dict[str, Any]) -> None:
    """The part makes a whole recipe of some task."""
    method = part.get("method")
    if isinstance(method, dict) and "name" not in method:
        part = {**part, "method": {"name": "kd", **method}}
    said = []
    for base in BASES:
        if part.get("task", base["task"]) == base["task"]:
            try:
                recipe_from_dict(merged(base, part))
                return
            except KdtrainError as error:
                said.append(f"{base['task']}: {error}")
    raise AssertionError("\n".join(said))


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_parse(block: str) -> None:
    content = yaml.safe_load(block)
    if content.get("task") == "study":
        check_recipe(content)
    else:
        fits(content)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_parse(path: Path) -> None:
    check_recipe(read_yaml(path))
