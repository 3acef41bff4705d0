"""A recipe describes one run: frozen dataclasses, one YAML file, any field overridable on the command line."""

from kdtrain.recipe.files import (
    describe_fields,
    differences,
    load_recipe,
    read_recipe,
    recipe_from_dict,
    recipe_to_dict,
    save_recipe,
    task_of,
)
from kdtrain.recipe.sections import (
    DataRecipe,
    MethodRecipe,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
)

__all__ = [
    "DataRecipe",
    "MethodRecipe",
    "Recipe",
    "StudentRecipe",
    "TeacherRecipe",
    "TrainingRecipe",
    "describe_fields",
    "differences",
    "load_recipe",
    "read_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
    "save_recipe",
    "task_of",
]
