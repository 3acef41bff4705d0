"""Recipes of any task: YAML in, checked recipe out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from kdtrain.errors import KdtrainError
from kdtrain.recipe import ClassificationRecipe, DistillationRecipe, LanguageRecipe, MaskedRecipe, RunRecipe
from kdtrain.recipe.base import MethodOptions, nearest, parse_method
from kdtrain.recipe.load import read_yaml
from kdtrain.recipe.presets import with_method_preset

RECIPES: dict[str, type[RunRecipe]] = {
    "classification": ClassificationRecipe,
    "code_lm": LanguageRecipe,
    "masked_lm": MaskedRecipe,
}
"""By `task`."""


R = TypeVar("R", bound=RunRecipe)


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: type[R] = RunRecipe,
) -> R:
    """Read the YAML recipe of one run.

    Args:
        path: the YAML file.
        overrides: words of the command line, such as `--training.learning_rate 3e-4`.
        kind: the class of recipe that the caller can use.

    Raises:
        KdtrainError: no such file, not YAML, an unknown field (with the nearest one), a wrong value, or another task.
    """
    recipe = recipe_from_dict(read_yaml(path, overrides))
    if not isinstance(recipe, kind):
        raise KdtrainError(f"{path} is a recipe of task {recipe.task}, which cannot be used here")
    return recipe


def task_named_in(content: dict[str, Any]) -> str:
    """The `task` of the content of a recipe.

    Raises:
        KdtrainError: it names none.
    """
    task = content.get("task")
    known = [*RECIPES, "study"]
    if task is None:
        raise KdtrainError(f"task is missing: write task: and one of {', '.join(known)}")
    if not isinstance(task, str) or task not in known:
        near = nearest(task, known) if isinstance(task, str) else None
        hint = "" if near is None else f"; did you mean {near}?"
        raise KdtrainError(f"task must be one of {', '.join(known)}, got {task!r}{hint}")
    return task


def recipe_from_dict(content: dict[str, Any]) -> RunRecipe:
    """A recipe from plain dicts, lists and scalars, the inverse of `Section.plain`.

    Raises:
        KdtrainError: an unknown or wrong field, or what `kdtrain.methods.check_methods` refuses.
    """
    task = task_named_in(content)
    if task == "study":
        raise KdtrainError("this is a study of many runs; start it with kdtrain study")
    kind = RECIPES[task]
    if not issubclass(kind, DistillationRecipe):
        return kind.parse(content)
    content = with_method_preset(content)
    section = content.get("method")
    if "method" in content:
        kind.parse({**content, "method": ()})  # a wrong field is refused before torch is loaded
    recipe = kind.parse({**content, "method": parsed_methods(section)} if "method" in content else content)
    check_teacher(recipe)
    return recipe


def parsed_methods(section: Any) -> tuple[MethodOptions, ...]:
    """The options of every method in a `method:` section: one entry, or a list of several.

    Raises:
        KdtrainError: no such method, or wrong options.
    """
    from kdtrain.methods import OPTIONS

    if not isinstance(section, list | tuple):
        return (parse_method(section, OPTIONS),)
    if not section:
        raise KdtrainError("method is an empty list; name at least one method")
    return tuple(parse_method(one, OPTIONS, f"method[{i}].") for i, one in enumerate(section))


def check_teacher(recipe: DistillationRecipe) -> None:
    """Refuse methods that the task or the recipe cannot serve, before anything is loaded."""
    from kdtrain.methods import check_methods, method_class

    check_methods(recipe.methods, recipe.task)
    teacher = getattr(recipe, "teacher", None)
    for one in recipe.methods:
        names = method_class(one.name).teachers_of(one)
        if names and (teacher is None or teacher.path is None):
            raise KdtrainError(
                f"method {one.name} needs a teacher; set {names[0]}.path to a folder or hub id, or method.name: ft"
            )
