"""What a recipe may hold, for people (`--help`) and for editors (JSON schema)."""

import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kdtrain.recipe.base import Section, literal_values, section_of


def describe(kind: type[Section], prefix: str = "") -> str:
    """Every field of a recipe class with its default, allowed values and help, one field a paragraph."""
    lines = []
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            lines.append(_line(name, field, prefix))
        else:
            lines += ["", f"{prefix}{name}: {first_line(inner)}", describe(inner, f"{prefix}{name}.")]
    return "\n".join(lines)


def first_line(kind: type[Section]) -> str:
    """The first line of a section's docstring."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def json_schema(kind: type[Section]) -> dict[str, Any]:
    """The JSON schema of a recipe class, for completion and checks in an editor."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **fields_schema(kind)}


def fields_schema(kind: type[Section]) -> dict[str, Any]:
    """The JSON schema of one section, with the bounds of every number."""
    return _with_bounds(kind.model_json_schema())


_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _with_bounds(schema: Any) -> Any:
    # pydantic writes the bounds of a field with a validator under its own names, which no editor knows.
    if isinstance(schema, dict):
        return {_BOUNDS.get(name, name): _with_bounds(value) for name, value in schema.items()}
    return [_with_bounds(one) for one in schema] if isinstance(schema, list) else schema


def _line(name: str, field: FieldInfo, prefix: str) -> str:
    choices = literal_values(field.annotation) or _item_choices(field.annotation)
    allowed = f" [{', '.join(map(str, choices))}]" if len(choices) > 1 else ""
    return f"  --{prefix}{name} ({_default(field)}){allowed}\n        {field.description or ''}"


def _item_choices(annotation: Any) -> tuple[Any, ...]:
    """The allowed entries of a list."""
    return tuple(value for inner in typing.get_args(annotation) for value in literal_values(inner))


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "needed"
    if default in (None, (), "", {}):
        return "none"
    return str(list(default) if isinstance(default, tuple) else default)


def run_schema(
    kind: type[Section], methods: Mapping[str, type[Section]], presets: Iterable[str] = ()
) -> dict[str, Any]:
    """The JSON schema of a run: `method:` is one of the methods, or a list of several, each with its own fields.

    Args:
        kind: the class of recipe.
        methods: the options of every method that serves the task, by name.
        presets: methods that have a `preset: study`.
    """
    schema = json_schema(kind)
    schema["required"] = list(dict.fromkeys(["task", *schema.get("required", [])]))
    if "method" not in kind.model_fields:
        return schema
    for name, options in methods.items():
        own = fields_schema(options)
        own["title"] = name
        own["required"] = list(dict.fromkeys(["name", *own.get("required", [])]))
        if name in presets:
            own["properties"]["preset"] = {"const": "study", "description": "values of arXiv 2508.15423"}
        schema["$defs"][f"method_{name}"] = own
    one = {"oneOf": [{"$ref": f"#/$defs/method_{name}"} for name in methods]}
    several = {"type": "array", "items": one, "minItems": 1}
    description = kind.model_fields["method"].description
    schema["properties"]["method"] = {"oneOf": [one, several], "description": description}
    schema["$defs"].pop("MethodOptions", None)
    return schema
