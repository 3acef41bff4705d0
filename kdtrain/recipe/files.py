"""Recipes as YAML: read with overrides, checked key by key, written back whole."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from kdtrain.errors import KdtrainError
from kdtrain.files import write_atomic
from kdtrain.recipe.presets import with_presets
from kdtrain.recipe.sections import Recipe

Value = TypeVar("Value")
TASK = "classification"


def describe_fields(kind: type[Any] = Recipe) -> str:
    """Every field of a recipe class with its default and its help, as `kdtrain train --help` prints them."""
    lines = []
    for section in dataclasses.fields(kind):
        inner = typing.get_type_hints(kind)[section.name]
        if dataclasses.is_dataclass(inner):
            lines.append(f"\n{section.name}: {inner.__doc__}")
            lines += [_describe(item, f"{section.name}.") for item in dataclasses.fields(inner)]
        else:
            lines.append(_describe(section, ""))
    return "\n".join(lines)


def _describe(item: dataclasses.Field[Any], prefix: str) -> str:
    if item.default is dataclasses.MISSING:
        default = "needed" if item.default_factory is dataclasses.MISSING else "none"
    else:
        default = "none" if item.default in (None, (), "") else item.default
        default = list(default) if isinstance(default, tuple) else default
    return f"  --{prefix}{item.name} ({default})\n        {item.metadata['help']}"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe; `overrides` are command-line words such as `--training.learning_rate 3e-4`.

    Raises:
        KdtrainError: no such file, not YAML, an unknown key (with the nearest valid name), or a wrong value.
    """
    return recipe_from_dict(read_recipe(path, overrides))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a YAML recipe of any task, overrides put in, nothing else checked."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise KdtrainError(f"there is no recipe at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KdtrainError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise KdtrainError(
            f"{path} must hold sections such as `data:` and `student:`, got {type(content).__name__}"
        )
    for dotted, value in _parse_overrides(overrides):
        *sections, last = dotted.split(".")
        place = content
        for section in sections:
            if place.get(section) is None:  # `training:` with nothing below it
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise KdtrainError(f"--{dotted}: {section} is not a section of {path}")
        place[last] = value
    return content


def task_of(content: dict[str, Any]) -> str:
    """What a recipe's content is a recipe of."""
    task = content.get("task", "study" if "tasks" in content else TASK)
    if not isinstance(task, str):
        raise KdtrainError(f"task must be text, got {task!r}")
    return task


def save_recipe(recipe: Any, path: Path) -> None:
    """Write every field, defaults too."""
    write_atomic(path, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as they stand in YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(recipe))


def recipe_from_dict(content: dict[str, Any]) -> Recipe:
    """The inverse of `recipe_to_dict`; missing fields take the values of the presets, then their defaults."""
    content = dict(content)
    task = content.pop("task", TASK)
    if task != TASK:
        raise KdtrainError(f"this command reads recipes of task {TASK}, got task: {task}")
    return build(Recipe, with_presets(content))


def build(kind: type[Value], content: dict[str, Any]) -> Value:
    """A recipe of the given class from plain dicts, every key and value checked."""
    return _build(kind, content, "")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted fields in which two recipes differ, as 'name: old there, new here'."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before} there, {after} here")
    return found


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise KdtrainError(f"expected an override such as --training.learning_rate 3e-4, got {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise KdtrainError(f"--{name} needs a value")
            value = remaining.pop(0)
        try:
            pairs.append((name, yaml.safe_load(value)))
        except yaml.YAMLError:
            raise KdtrainError(f"--{name}: {value!r} is not a value") from None
    return pairs


def _build(kind: type[Any], content: Any, prefix: str) -> Any:
    if not isinstance(content, dict):
        raise KdtrainError(f"{prefix.rstrip('.')} must be a section with fields, got {content!r}")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    annotations = typing.get_type_hints(kind)
    values = {}
    for name, value in content.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.0)[0]
            raise KdtrainError(
                f"unknown recipe key {prefix}{name}; did you mean {prefix}{near}? (valid here: {', '.join(fields)})"
            )
        values[name] = _convert(value, annotations[name], f"{prefix}{name}")
    if "data" in fields and "data" not in values:
        raise KdtrainError("a recipe needs a `data:` section with data.path or data.train")
    return kind(**values)


def _convert(value: Any, annotation: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _build(typing.cast(type, annotation), {} if value is None else value, f"{name}.")
    if origin is types.UnionType:  # `X | None`
        return None if value is None else _convert(value, arguments[0], name)
    if origin is Literal:
        if value not in arguments:
            raise KdtrainError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise KdtrainError(f"{name} must be a section with fields, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise KdtrainError(f"{name} must be a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise KdtrainError(f"{name} must have {len(arguments)} entries, got {value!r}")
        return tuple(
            _convert(item, kind, f"{name}[{i}]")
            for i, (item, kind) in enumerate(zip(value, arguments, strict=True))
        )
    try:
        return _scalar(value, annotation)
    except (TypeError, ValueError):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        unquoted = annotation is str and isinstance(value, bool)
        hint = "; YAML reads no, off, yes and on so: put the word into quotes" if unquoted else ""
        raise KdtrainError(f"{name} must be {words[annotation]}, got {value!r}{hint}") from None


def _scalar(value: Any, kind: type) -> Any:
    # YAML 1.1 reads 3e-4 as text, and bool is an int in Python: both are caught here.
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not kind:
        raise TypeError
    return value
