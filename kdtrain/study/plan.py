"""What a study runs: one YAML file, unfolded into the recipe of every cell of its grid."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdtrain.errors import KdtrainError
from kdtrain.recipe import ClassificationRecipe, Section, read_yaml
from kdtrain.recipe.base import POSITIVE, Text, Whole
from kdtrain.tasks.recipes import recipe_from_dict

BASELINE = "ft"
"""The method that the others are compared with, by the name of its recipe."""

TASK_FIELDS = ("build", "data", "teacher", "student", "training")


class StudyRecipe(Section):
    """A study, whole. Sections of a run's recipe may stand in `common`, in a task, in a student and in a method; later wins."""

    task: Literal["study"] = Field(default="study", description="a grid of runs")
    tasks: dict[Any, Any] = Field(
        description="by name: data, teacher, and for a data set built here `build: exceptions`"
    )
    students: dict[Any, Any] = Field(description="by name: fields of the student section")
    methods: dict[Any, Any] = Field(
        description="by name: fields of the method section; `training:` inside holds that method's own"
    )
    common: dict[str, Any] = Field(default={}, description="sections of a recipe that hold for every run")
    seeds: tuple[Whole, ...] = Field(default=(0, 1, 2), description="one run of every cell for each")
    workers: Annotated[Whole, POSITIVE] | None = Field(
        default=None, description="runs at the same time; by default one a GPU, or one a core"
    )
    output: Text = Field(default="runs/study", description="folder of the study")

    @model_validator(mode="after")
    def _grid(self) -> Self:
        for name in ("tasks", "students", "methods"):
            if not getattr(self, name):
                raise KdtrainError(f"a study needs at least one of its {name}")
            for one in getattr(self, name):
                if not isinstance(one, str):
                    raise KdtrainError(f"names of {name} must be text, got {one!r}: put it into quotes")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise KdtrainError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: str
    student: str
    method: str
    recipe: ClassificationRecipe

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.task}-{self.student}-{self.method}-{self.recipe.seed}"


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyRecipe:
    """Read a study; `overrides` are words such as `--seeds '[0]'` or `--common.training.max_steps 50`.

    Raises:
        KdtrainError: no such file, an unknown key, or a section that is none.
    """
    return study_from_dict(read_yaml(path, overrides))


def study_from_dict(content: dict[str, Any]) -> StudyRecipe:
    """A study from plain dicts, every key checked."""
    if content.get("task") != "study":
        raise KdtrainError(f"kdtrain study reads recipes of task study, got task: {content.get('task')}")
    return StudyRecipe.parse(content)


def unfold(study: StudyRecipe) -> list[Cell]:
    """Every cell, tasks outermost and seeds innermost; every recipe is checked."""
    return [
        Cell(task, student, method, _recipe(study, task, student, method, seed))
        for task in study.tasks
        for student in study.students
        for method in study.methods
        for seed in study.seeds
    ]


def _recipe(study: StudyRecipe, task: str, student: str, method: str, seed: int) -> ClassificationRecipe:
    place = f"{task}, {student}, {method}"
    own_task = _section(study.tasks[task], f"tasks.{task}")
    unknown = sorted(set(own_task) - set(TASK_FIELDS))
    if unknown:
        raise KdtrainError(f"tasks.{task} has the unknown key {unknown[0]}; valid: {', '.join(TASK_FIELDS)}")
    own_method = _section(study.methods[method], f"methods.{method}")
    content = _merge(
        {"task": "classification"},
        study.common,
        {name: value for name, value in own_task.items() if name != "build"},
        {"student": _section(study.students[student], f"students.{student}")},
        {"training": own_method.pop("training", {}), "method": own_method},
        {"seed": seed, "output": str(Path(study.output) / "runs" / f"{task}-{student}-{method}-{seed}")},
    )
    try:
        recipe = recipe_from_dict(content)
    except KdtrainError as error:
        sections = f"common, tasks.{task}, students.{student} and methods.{method}"
        raise KdtrainError(f"the study's cell ({place}), from {sections}: {error}") from None
    if not isinstance(recipe, ClassificationRecipe):
        raise KdtrainError(f"a study compares runs of task classification, got task: {recipe.task}")
    return recipe


def _section(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise KdtrainError(f"{name} must be a section with fields, got {value!r}")
    return dict(value)


def _merge(*parts: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(merged.get(name), dict) and (value is None or isinstance(value, dict)):
                # `training:` with nothing below it says nothing.
                merged[name] = _merge(merged[name], value or {})
            else:
                merged[name] = copy.deepcopy(value)
    return merged
