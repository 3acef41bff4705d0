"""The generated pages of the reference: docs/reference/cli.md from the argument parser, docs/reference/recipe.md from the schema.

`python -m dev.reference` (part of `make docs`) writes them; tests/docs/test_reference.py compares what is committed.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdtrain.cli import COMMANDS, add_arguments, command_parsers
from kdtrain.commands.methods import summary
from kdtrain.methods import METHODS
from kdtrain.recipe.base import Section, section_of
from kdtrain.recipe.presets import STUDENTS, STUDY
from kdtrain.recipe.schema import fields_schema
from kdtrain.study.plan import StudyRecipe
from kdtrain.tasks.recipes import RECIPES

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
NOTE = "<!-- Written by `python -m dev.reference`; change the code that it reads instead. -->"
TASKS = {
    "classification": "A classifier of code learns from labels, from a teacher, or from both.",
    "code_lm": "A causal language model of code learns from a folder of code and a teacher.",
    "masked_lm": "An encoder learns to fill in masked tokens. It has no teacher.",
}


def main() -> None:
    """Write every generated page."""
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")


# ---- commands


def cli_page() -> str:
    """Every command and option, from the argument parser."""
    _, parsers = command_parsers()
    lines = [
        "# Command line",
        "",
        NOTE,
        "",
        "`kdtrain COMMAND --help` prints the same. `kdtrain --version` prints the versions of the libraries.",
        "Commands marked with \\* read a recipe: any field of it can follow, as in `--training.learning_rate 3e-4`.",
        "[Recipe fields](recipe.md) lists the fields.",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    for name, command in COMMANDS.items():
        star = " \\*" if command.recipe else ""
        lines.append(f"| [`{name}`](#{name}){star} | {command.summary} |")
    lines += [
        "",
        "Exit codes: 0 is success, 1 an error that `kdtrain doctor` found, 2 wrong input, 130 Ctrl-C and 143 SIGTERM.",
    ]
    for name, command in COMMANDS.items():
        add_arguments(name, parsers[name])
        lines += command_lines(f"## {name}", parsers[name], command.summary)
    return "\n".join(lines) + "\n"


def command_lines(heading: str, parser: argparse.ArgumentParser, text: str) -> Iterator[str]:
    """A heading, the usage, a table of arguments, and the same for every command inside."""
    actions = [one for one in parser._actions if not isinstance(one, argparse._HelpAction)]
    inner = [one for one in actions if isinstance(one, argparse._SubParsersAction)]
    own = [one for one in actions if one not in inner]
    yield from ("", heading, "", f"{text[0].upper()}{text[1:].rstrip('.')}.".replace("?.", "?"))
    if own:
        yield from ("", "| argument | values | default | meaning |", "|---|---|---|---|")
    for action in own:
        yield f"| {_argument(action)} | {_values(action)} | {_argument_default(action)} | {cell(_help(action))} |"
    for group in inner:
        for name, child in group.choices.items():
            yield from command_lines(
                f"{heading.replace('## ', '### ')} {name}", child, child.description or ""
            )


def _argument(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or action.metavar or action.dest
    return f"`{name}`"


def _values(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{one}`" for one in action.choices)
    if action.nargs == 0:
        return "flag"
    kind = {int: "whole number", float: "number", Path: "path"}.get(action.type, "text")
    return (
        f"{kind}, may be repeated"
        if isinstance(action, argparse._AppendAction) or action.nargs == "*"
        else kind
    )


def _argument_default(action: argparse.Action) -> str:
    positional = not action.option_strings
    if (positional and action.nargs not in ("?", "*")) or (action.required and not positional):
        return "required"
    return "none" if action.default in (None, False, []) else f"`{action.default}`"


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%(default)s", str(action.default))
    return text if action.default is None else re.sub(r" \(default: [^)]*\)", "", text)


# ---- recipes


def recipe_page() -> str:
    """Every field of every recipe, from the pydantic classes."""
    lines = [
        "# Recipe fields",
        "",
        NOTE,
        "",
        "A recipe is one YAML file. `task:` says which of the pages below holds for it. Every field can be set on the command",
        "line by its dotted name, as in `--training.batch_size 64`. `kdtrain train RECIPE --print-config` prints the recipe with",
        "all defaults, and `kdtrain schema TASK` prints a JSON schema for editors.",
        "",
        "An unknown field is an error that names the nearest right one. Values that a field does not allow are errors too.",
    ]
    for task, kind in RECIPES.items():
        lines += ["", f"## task: {task}", "", TASKS[task], *section_lines(kind, "", f"### {task}: ")]
    lines += [
        "",
        "## task: study",
        "",
        f"{summary_of(StudyRecipe)} `kdtrain study` runs it.",
        *section_lines(StudyRecipe, "", "### study: "),
        "",
        "## method",
        "",
        "`method:` holds the fields of one method, or is a list of several whose losses are added. [Methods](../methods.md) says",
        "what each one is for.",
    ]
    for name, method in METHODS.items():
        preset = "`preset: study` fills fields with the values of arXiv 2508.15423. " if name in STUDY else ""
        tasks = ", ".join(f"`{task}`" for task in RECIPES if task in method.tasks)
        lines += ["", f"### method: {name}", "", summary(method), "", f"{preset}Tasks: {tasks}."]
        lines += table(method.Options, "method.", leave_out=["name"])
    lines += [
        "",
        "## student.preset",
        "",
        "Shapes by name, for `student.preset` of task classification and masked_lm.",
        "",
    ]
    columns = list(dict.fromkeys(name for one in STUDENTS.values() for name in one))
    lines += [f"| preset | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, one in STUDENTS.items():
        values = [str(one.get(column, "none")) for column in columns]
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def section_lines(kind: type[Section], prefix: str, heading: str) -> Iterator[str]:
    """Tables of a recipe: its own fields, then every section."""
    inner = {
        name: section
        for name, field in kind.model_fields.items()
        if (section := section_of(field.annotation))
    }
    yield from table(kind, prefix, leave_out=inner)
    for name, section in inner.items():
        yield from ("", f"{heading}{name}", "", summary_of(section))
        yield from table(section, f"{prefix}{name}.")


def summary_of(kind: type[Section]) -> str:
    """The first paragraph of a section's docstring."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def table(kind: type[Section], prefix: str, leave_out: Iterable[str] = ()) -> Iterator[str]:
    """One row for each field."""
    schema = fields_schema(kind)
    required = schema.get("required", [])
    yield from ("", "| field | type | default | meaning |", "|---|---|---|---|")
    for name, field in kind.model_fields.items():
        if name in leave_out:
            continue
        entry = schema["properties"][name]
        words = field.description or entry.get("description", "")
        if name in required:
            default = "required"
        else:
            default = default_of(field.get_default(call_default_factory=True, validated_data={}))
        words_of_type = "section or list of sections" if name == "method" else type_of(entry, schema)
        yield f"| `{prefix}{name}` | {cell(words_of_type)} | {default} | {cell(words)} |"


def default_of(value: Any) -> str:
    """A default as it is written in YAML."""
    if value in (None, (), {}, ""):
        return "none"
    words = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return f"`{list(value) if isinstance(value, tuple) else words}`"


def type_of(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A property of a JSON schema in words."""
    if "$ref" in entry:
        return type_of(schema["$defs"][entry["$ref"].rpartition("/")[2]], schema)
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return "one of " + ", ".join(f"`{one}`" for one in entry["enum"])
    if "anyOf" in entry or "oneOf" in entry:
        kinds = [type_of(one, schema) for one in entry.get("anyOf", entry.get("oneOf", []))]
        return " or ".join(one for one in dict.fromkeys(kinds) if one != "nothing")
    kind = entry.get("type")
    if kind == "array":
        return _list_of(entry, schema)
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    words = {**names, "null": "nothing", "object": "section"}.get(str(kind), "any")
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {entry[key]:,}" for key, sign in bounds.items() if key in entry]
    return " ".join([words, ", ".join(limits)]).strip()


def _list_of(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    items, inner = entry.get("prefixItems"), entry.get("items")
    if items:
        return f"[{', '.join(type_of(one, schema) for one in items)}]"
    return f"list of {type_of(inner, schema)}" if isinstance(inner, dict) and inner else "list"


def cell(text: str) -> str:
    """Text that stays inside its cell of a table."""
    text = " ".join(text.split())
    for character, escaped in (("|", "\\|"), ("<", "&lt;"), ("__", "\\_\\_")):
        text = text.replace(character, escaped)
    return text


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "recipe.md": recipe_page}

if __name__ == "__main__":
    main()
