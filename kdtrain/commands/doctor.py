"""kdtrain doctor RECIPE."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from kdtrain.console import add_output_options, result, show
from kdtrain.doctor import PAGE, Finding, refusal
from kdtrain.errors import KdtrainError
from kdtrain.recipe import ClassificationRecipe, LanguageRecipe, read_yaml
from kdtrain.tasks.recipes import recipe_from_dict, task_named_in

MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "info": ("✓", "green")}
"""Of each level on a terminal, with its style."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.add_argument(
        "recipe",
        help="YAML file of a run (task classification or code_lm) or a study; any field can follow, as in --seed 1",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="task code_lm: memory and communication of 1 to 1024 devices, from shapes alone",
    )
    add_output_options(parser, quiet="print errors and warnings only")


def main(arguments: argparse.Namespace) -> int:
    """Print what was found; code 1 when there is an error."""
    content = read_yaml(arguments.recipe, arguments.overrides)
    if arguments.plan:
        return print_plan(content)
    findings = examined(content)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    listed = [{**asdict(finding), "group": finding.group, "link": finding.link} for finding in findings]
    kept = [finding for finding in findings if not (arguments.quiet and finding.level == "info")]
    words = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    end = f"{words}; {PAGE} explains every code"
    result(
        arguments,
        "\n".join([*(finding.line() for finding in kept), end]),
        {"errors": counts["error"], "warnings": counts["warning"], "findings": listed},
        draw=lambda: [drawn_findings(kept), end],
    )
    return 1 if counts["error"] else 0


def examined(content: dict[str, Any]) -> list[Finding]:
    """The findings of a recipe of any task that has checks."""
    task = task_named_in(content)
    if task == "study":
        return examine_study(content)
    recipe = recipe_from_dict(content)
    if isinstance(recipe, LanguageRecipe):
        from kdtrain.doctor.code_lm import examine_language

        return examine_language(recipe)
    if isinstance(recipe, ClassificationRecipe):
        from kdtrain.doctor.classification import examine_recipe

        return examine_recipe(recipe)
    raise KdtrainError(f"kdtrain doctor has no checks for task: {task}")


def drawn_findings(findings: Sequence[Finding]) -> Table:
    """The findings by group, as a terminal shows them."""
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for column in ("group", "mark", "code"):
        table.add_column(column, no_wrap=True)
    table.add_column("text", overflow="fold")
    last = ""
    for finding in sorted(findings, key=lambda one: one.code[2]):
        mark, style = MARKS[finding.level]
        group = "" if finding.group == last else finding.group
        last = finding.group
        table.add_row(Text(group, "bold"), Text(mark, style), Text(finding.code, style), Text(finding.text))
    return table


def print_plan(content: dict[str, Any]) -> int:
    """Where the memory of one device goes, without opening data or weights."""
    recipe = None if task_named_in(content) == "study" else recipe_from_dict(content)
    if not isinstance(recipe, LanguageRecipe):
        raise KdtrainError(f"--plan is for recipes of task code_lm, got task: {content['task']}")
    from kdtrain.doctor.memory_plan import plan_table

    show(plan_table(recipe))
    return 0


def examine_study(content: dict[str, Any]) -> list[Finding]:
    """The findings of every task, student and method with the first seed, each once."""
    from kdtrain.study.plan import study_from_dict, unfold

    study = study_from_dict(content)
    from kdtrain.doctor.classification import examine_recipe
    from kdtrain.study.shared import make_data, shared_cache
    from kdtrain.tasks.base import SharedInputs

    findings: dict[Finding, str] = {}
    shared = SharedInputs()
    for cell in unfold(study):
        place = f"{cell.task}, {cell.student}, {cell.method}"
        if cell.recipe.seed != study.seeds[0]:
            continue
        teacher = cell.recipe.teacher.replaced(cache=shared_cache(study, cell))
        try:
            make_data(study.tasks[cell.task], cell)
            for finding in examine_recipe(cell.recipe.replaced(teacher=teacher), shared):
                findings.setdefault(finding, place)
        except KdtrainError as error:
            findings.setdefault(refusal(error), place)
    return [replace(finding, text=f"({place}) {finding.text}") for finding, place in findings.items()]
