"""What the recipes of all tasks have in common."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_serializer, field_validator, model_validator

from kdtrain.recipe.base import MethodOptions, Section, section_of
from kdtrain.recipe.training import TrainingSection

METHOD: Any = Field(
    description="how the student learns: one method, or a list of several whose losses are added"
)
OUTPUT: Any = Field(default="runs/run", description="folder of the run")
SEED: Any = Field(
    default=0, ge=0, lt=2**32, description="initial weights, order of the rows, dropout, token masking"
)


class RunRecipe(Section):
    """One run, whole. A task declares its fields in the order in which they are written."""

    if TYPE_CHECKING:

        @property
        def task(self) -> str:
            """What is trained."""
            ...

        @property
        def training(self) -> TrainingSection:
            """Steps, optimizer, and how often to evaluate, save and log."""
            ...

        @property
        def output(self) -> str:
            """Folder of the run."""
            ...

        @property
        def seed(self) -> int:
            """Initial weights, order of the rows, dropout, token masking."""
            ...

    @property
    def methods(self) -> tuple[MethodOptions, ...]:
        """The options of every method; a task without a `method:` section has none."""
        return ()

    @property
    def method_name(self) -> str:
        """The names of all methods."""
        return " + ".join(one.name for one in self.methods)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_sections(cls, content: Any) -> Any:
        # `training:` with nothing below it
        if not isinstance(content, Mapping):
            return content
        empty = {name for name, field in cls.model_fields.items() if section_of(field.annotation)}
        return {name: value for name, value in content.items() if value is not None or name not in empty}


class DistillationRecipe(RunRecipe):
    """A run whose student learns by one or several methods."""

    if TYPE_CHECKING:

        @property
        def method(self) -> tuple[MethodOptions, ...]:
            """How the student learns."""
            ...

    @field_validator("method", mode="before", check_fields=False)
    @classmethod
    def _as_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, MethodOptions | Mapping) else value

    @field_serializer("method", check_fields=False)
    def _as_written(self, methods: tuple[MethodOptions, ...]) -> Any:
        contents = [one.model_dump() for one in methods]
        return contents[0] if len(contents) == 1 else contents

    @property
    def methods(self) -> tuple[MethodOptions, ...]:
        """The options of every method."""
        return self.method
