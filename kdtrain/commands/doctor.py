"""kdtrain doctor RECIPE."""

import argparse
import importlib
from dataclasses import replace
from typing import Any

from kdtrain.doctor import Finding, wrong
from kdtrain.errors import KdtrainError
from kdtrain.recipe import read_recipe, task_of

EXAMINERS = {
    "classification": "kdtrain.commands.doctor:examine_classification",
    "study": "kdtrain.commands.doctor:examine_study",
    "code_lm": "kdtrain.doctor.code_lm:examine_language",
}
"""By a recipe's `task`: the function from its content to its findings."""


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


def main(arguments: argparse.Namespace) -> int:
    """Print what was found; code 1 when something is wrong."""
    content = read_recipe(arguments.recipe, arguments.overrides)
    task = task_of(content)
    if task not in EXAMINERS:
        raise KdtrainError(f"kdtrain doctor knows the tasks {', '.join(EXAMINERS)}, got task: {task}")
    if arguments.plan:
        return print_plan(task, content)
    module, _, function = EXAMINERS[task].partition(":")
    findings: list[Finding] = getattr(importlib.import_module(module), function)(content)
    for finding in findings:
        print(finding.line())
    count = sum(finding.level == "wrong" for finding in findings)
    print(f"{count} wrong, {sum(finding.level == 'suspicious' for finding in findings)} suspicious")
    return 1 if count else 0


def print_plan(task: str, content: dict[str, Any]) -> int:
    """Where the memory of one device goes, without opening data or weights."""
    if task != "code_lm":
        raise KdtrainError(f"--plan is for recipes of task code_lm, got task: {task}")
    from kdtrain.doctor.memory_plan import plan_table
    from kdtrain.tasks.code_lm.recipe import language_recipe_from_dict

    print(plan_table(language_recipe_from_dict(content)))
    return 0


def examine_classification(content: dict[str, Any]) -> list[Finding]:
    """The findings of one run."""
    from kdtrain.recipe import recipe_from_dict

    recipe = recipe_from_dict(content)
    from kdtrain.doctor.classification import examine_recipe

    return examine_recipe(recipe)


def examine_study(content: dict[str, Any]) -> list[Finding]:
    """The findings of every task, student and method with the first seed, each said once."""
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
        teacher = replace(cell.recipe.teacher, cache=shared_cache(study, cell))
        try:
            make_data(study.tasks[cell.task], cell)
            for finding in examine_recipe(replace(cell.recipe, teacher=teacher), shared):
                findings.setdefault(finding, place)
        except KdtrainError as error:
            findings.setdefault(wrong(str(error)), place)
    return [Finding(finding.level, f"({place}) {finding.text}") for finding, place in findings.items()]
