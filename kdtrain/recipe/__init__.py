"""A recipe describes one run: one YAML file, any field overridable on the command line.

Its sections are here; `kdtrain.tasks.recipes` reads a recipe of any task with the options of its methods.
"""

from kdtrain.recipe.base import MethodOptions, Section
from kdtrain.recipe.classification import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    TeacherSection,
)
from kdtrain.recipe.code_lm import (
    LanguageDataSection,
    LanguageRecipe,
    LanguageStudentSection,
    LanguageTeacherSection,
    LanguageTraining,
)
from kdtrain.recipe.load import differences, read_yaml, save_recipe, to_yaml, with_defaults
from kdtrain.recipe.masked_lm import MaskedDataSection, MaskedRecipe, MaskedTraining
from kdtrain.recipe.run import DistillationRecipe, RunRecipe
from kdtrain.recipe.students import StudentSection
from kdtrain.recipe.training import TrainingSection

__all__ = [
    "ClassificationRecipe",
    "ClassificationTraining",
    "DataSection",
    "DistillationRecipe",
    "LanguageDataSection",
    "LanguageRecipe",
    "LanguageStudentSection",
    "LanguageTeacherSection",
    "LanguageTraining",
    "MaskedDataSection",
    "MaskedRecipe",
    "MaskedTraining",
    "MethodOptions",
    "RunRecipe",
    "Section",
    "StudentSection",
    "TeacherSection",
    "TrainingSection",
    "differences",
    "read_yaml",
    "save_recipe",
    "to_yaml",
    "with_defaults",
]
