"""Recipes as YAML: read with overrides, written back whole, compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kdtrain.errors import KdtrainError
from kdtrain.files import write_atomic
from kdtrain.recipe.base import Section

DEEPEST = 32
"""Levels of nesting in a recipe; more is a mistake or an attack on the reader."""


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, of which the last would silently win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    content: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is no word", key_node.start_mark
            )
        if key in content:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key} stands twice in one section", key_node.start_mark
            )
        content[key] = loader.construct_object(value_node, deep=True)
    return content


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of sections and set the overrides; fields are checked later, by the recipe's class.

    Args:
        path: the YAML file.
        overrides: words of the command line, such as `--training.learning_rate 3e-4` or `--seed=1`.

    Raises:
        KdtrainError: there is no such file, it is not YAML, a key stands twice, or an override names no field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KdtrainError(f"there is no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KdtrainError(f"{path} is not a readable YAML file: {_one_line(error)}") from error
    try:
        _check_depth(text)
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise KdtrainError(f"{path} is not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise KdtrainError(
            f"{path} must hold sections such as `data:` and `student:`, got {type(content).__name__}"
        )
    for dotted, value in parse_overrides(overrides):
        set_field(content, dotted, value)
    return content


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise yaml.YAMLError(
                    f"line {event.start_mark.line + 1}: more than {DEEPEST} levels of nesting"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Pairs of a dotted field and a YAML value from `--a.b value` and `--a.b=value`.

    Raises:
        KdtrainError: a word is no override, or one has no value.
    """
    pairs, remaining = [], list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise KdtrainError(f"expected an override such as --training.learning_rate 3e-4, got {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise KdtrainError(f"--{name} needs a value")
            value = remaining.pop(0)
        try:
            pairs.append((name, yaml.load(value, _Loader)))
        except yaml.YAMLError:
            raise KdtrainError(f"--{name}: {value!r} is not a YAML value") from None
    return pairs


def set_field(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one field of a recipe's content; sections that are missing are made, entries of a list are named by number."""
    *sections, last = dotted.split(".")
    place: Any = content
    for section in sections:
        place = _entry(place, section, dotted)
    if isinstance(place, list):
        place[_index(place, last, dotted)] = value
    else:
        place[last] = value


def _entry(place: Any, name: str, dotted: str) -> Any:
    if isinstance(place, list):
        inner = place[_index(place, name, dotted)]
    else:
        if place.get(name) is None:  # `training:` with nothing below it
            place[name] = {}
        inner = place[name]
    if not isinstance(inner, dict | list):
        raise KdtrainError(f"--{dotted}: {name} is not a section of the recipe, it holds {inner!r}")
    return inner


def _index(place: list[Any], name: str, dotted: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise KdtrainError(
            f"--{dotted}: that is a list of {len(place)} entries, number them from 0 to {len(place) - 1}"
        )
    return int(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def save_recipe(recipe: Section, path: Path) -> None:
    """Write every field, defaults too."""
    write_atomic(path, to_yaml(recipe))


def to_yaml(recipe: Section) -> str:
    """Every field of a recipe, defaults too, as YAML."""
    return yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True)


def with_defaults(old: dict[str, Any], recipe: Section) -> dict[str, Any]:
    """A recipe that an earlier version wrote, with the defaults of the fields that were added since.

    Args:
        old: its content.
        recipe: a recipe of the same class.
    """
    filled = dict(old)
    for name, field in type(recipe).model_fields.items():
        value, inner = getattr(recipe, name), old.get(name)
        if name not in old and not field.is_required():
            default = field.get_default(call_default_factory=True)
            filled[name] = default.plain() if isinstance(default, Section) else default
        elif isinstance(value, Section) and isinstance(inner, dict):
            filled[name] = with_defaults(inner, value)
        elif isinstance(value, tuple):
            entries = inner if isinstance(inner, list) else [inner]
            found = [
                with_defaults(one, section)
                for one, section in zip(entries, value, strict=False)
                if isinstance(one, dict) and isinstance(section, Section)
            ]
            if len(found) == len(entries) == len(value):
                filled[name] = found if isinstance(inner, list) else found[0]
    return filled


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted fields in which two recipes differ, as 'training.max_steps: 5 there, 3 here'."""
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before} there, {after} here")
    return found
