"""The fields of recipes, as `kdtrain COMMAND --help` lists them."""

from kdtrain.recipe import ClassificationRecipe, LanguageRecipe, RunRecipe
from kdtrain.recipe.load import read_yaml
from kdtrain.recipe.schema import describe
from kdtrain.study.plan import StudyRecipe
from kdtrain.tasks.recipes import RECIPES, task_named_in

KINDS: dict[str, dict[str, type[RunRecipe]]] = {
    "train": RECIPES,
    "cache": {"classification": ClassificationRecipe, "code_lm": LanguageRecipe},
    "serve-command": {"code_lm": LanguageRecipe},
    "doctor": {"classification": ClassificationRecipe, "code_lm": LanguageRecipe},
}
"""By command: the tasks that it serves."""


def recipe_help(command: str, path: str | None) -> str:
    """The fields with their defaults and allowed values.

    Args:
        command: the name of the command.
        path: a recipe; the fields of its task are listed, and those of its methods.

    Raises:
        KdtrainError: the recipe cannot be read.
    """
    if command == "study":
        return (
            f"fields of a study, with their defaults:\n{describe(StudyRecipe)}\n\n"
            "The sections inside are those of a recipe of task classification: kdtrain train --help"
        )
    content = None if path is None else read_yaml(path)
    tasks = list(KINDS[command]) if content is None else [task_named_in(content)]
    parts = [
        f"fields of a recipe of task {task}, with their defaults:\n{describe(KINDS[command][task])}"
        for task in tasks
        if task in KINDS[command]
    ]
    names = [] if content is None else _methods(content.get("method"))
    if names:
        from kdtrain.methods import METHODS

        known = [name for name in names if name in METHODS]
        parts += [
            f"method: {name}, fields with their defaults:\n{describe(METHODS[name].Options, 'method.')}"
            for name in known
        ]
    else:
        parts.append("The fields of `method:` depend on its name: kdtrain methods NAME lists them.")
    return "\n\n".join(parts)


def _methods(section: object) -> list[str]:
    entries = section if isinstance(section, list) else [section]
    return [str(one["name"]) for one in entries if isinstance(one, dict) and "name" in one]
