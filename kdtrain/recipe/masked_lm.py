"""The recipe of `task: masked_lm`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import PART, Number, Section, Text, Whole
from kdtrain.recipe.run import OUTPUT, SEED, RunRecipe
from kdtrain.recipe.students import StudentSection
from kdtrain.recipe.training import TrainingSection


class MaskedDataSection(Section):
    """The code to learn from, without any labels."""

    kind: Literal["text", "exceptions"] = Field(
        default="text",
        description="text: whole documents; exceptions: Python functions with one masked exception name",
    )
    train: tuple[Text, ...] = Field(
        default=(),
        description="folders of source code, .txt, .jsonl, .csv or .parquet files, or ids of data sets on the hub; for "
        "exceptions folders of Python code, by default what is installed here under a permissive licence",
    )
    held_out: Annotated[Number, PART] = Field(
        default=0.01, description="share of the documents held out to measure on (text)"
    )
    suffixes: tuple[Text, ...] = Field(
        default=(".py",), description="endings of the files read from a folder (text)"
    )
    split: Text = Field(default="train", description="split of a data set on the hub (text)")
    text: Text = Field(default="code", description="column of the code, in files and data sets (text)")
    site_packages: tuple[Text, ...] = Field(
        default=(),
        description="further folders of installed packages, added to those of this Python (exceptions)",
    )

    @model_validator(mode="after")
    def _read_by_the_kind(self) -> Self:
        if self.kind == "text" and not self.train:
            raise KdtrainError("data.train is missing: name folders of source code, files or data sets")
        other = {
            "text": ("site_packages",),
            "exceptions": ("held_out", "suffixes", "split", "text"),
        }[self.kind]
        for name in other:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise KdtrainError(f"data.{name} does nothing with data.kind {self.kind}; leave it out")
        return self


class MaskedTraining(TrainingSection):
    """Steps, optimizer, and how often to evaluate, save and log."""

    metric_for_best_model: Literal["loss"] = Field(
        default="loss", description="validation metric that selects the best checkpoint: the held-out loss"
    )


class MaskedRecipe(RunRecipe):
    """An encoder that learns code by predicting masked tokens, to become a teacher."""

    task: Literal["masked_lm"] = Field(default="masked_lm", description="what is trained")
    data: MaskedDataSection = Field(description="code without labels")
    student: StudentSection = Field(default=StudentSection(), description="the encoder that is trained")
    training: MaskedTraining = Field(
        default=MaskedTraining(), description="steps, optimizer, and how often to evaluate"
    )
    output: Text = OUTPUT
    seed: Whole = SEED

    @model_validator(mode="after")
    def _transformers_only(self) -> Self:
        if self.student.architecture != "roberta":
            raise KdtrainError(
                "task masked_lm trains encoders of architecture roberta, or the one at student.path, got "
                f"student.architecture {self.student.architecture}"
            )
        return self
