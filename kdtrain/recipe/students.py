"""The `student:` section of tasks whose student is an encoder, and what holds for every student."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import POSITIVE, SHARE, Number, Section, Text, Whole
from kdtrain.recipe.presets import STUDENTS, with_student_preset

LENGTH: Any = Field(ge=8)
"""Tokens of a row: the special ones and a few more."""


class StudentSection(Section):
    """The encoder that is trained: its shape, or the checkpoint to start from."""

    preset: Literal[tuple(STUDENTS)] | None = Field(  # type: ignore[valid-type]
        default=None, description="shape by name; fields given here win"
    )
    architecture: Literal["roberta", "bigru"] = Field(
        default="roberta", description="encoder of a new student"
    )
    path: Text | None = Field(
        default=None,
        description="start from this folder or hub id (weights, shape, tokenizer); by default a new student",
    )
    tokenizer: Text | None = Field(
        default=None, description="folder of a finished tokenizer; by default one is trained on the data"
    )
    vocab_size: Annotated[Whole, Field(ge=300)] = Field(
        default=5000, description="tokens of the byte-level BPE that is trained"
    )
    hidden_size: Annotated[Whole, POSITIVE] = Field(
        default=128, description="width D; of one direction for bigru"
    )
    layers: Annotated[Whole, POSITIVE] = Field(default=2, description="encoder layers")
    heads: Annotated[Whole, POSITIVE] = Field(default=4, description="attention heads (roberta)")
    intermediate_size: Annotated[Whole, POSITIVE] = Field(
        default=512, description="width inside the feed-forward layers (roberta)"
    )
    max_length: Annotated[Whole, LENGTH] = Field(
        default=256, description="tokens of one row, special tokens included; longer rows are truncated"
    )
    insert: tuple[Text, ...] | None = Field(
        default=None,
        description="tokens inserted after the first token of every row; by default UniXcoder's mode where the "
        "vocabulary has it",
    )
    dropout: Annotated[Number, SHARE] = Field(
        default=0.1, description="dropout of embeddings, layers and head of a new student"
    )
    attention_dropout: Annotated[Number, SHARE] = Field(
        default=0.0,
        description="dropout of attention weights of a new student (roberta); above 0 it halves the speed on a CPU",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, content: Any) -> Any:
        return with_student_preset(content)

    @model_validator(mode="after")
    def _shape_of_new_students(self) -> Self:
        shape = ("architecture", "vocab_size", "hidden_size", "layers", "heads", "intermediate_size")
        only_of_new_students(self, *shape)
        only_of_new_students(self, "dropout", "attention_dropout", has="dropout")
        if self.architecture == "roberta" and self.hidden_size % self.heads:
            raise KdtrainError(
                f"student.hidden_size must be a multiple of student.heads, got {self.hidden_size} and {self.heads}"
            )
        return self


def only_of_new_students(section: Any, *names: str, has: str = "shape") -> None:
    """Refuse values of these fields beside `path`: a checkpoint has its own, and they would do nothing."""
    if section.path is None:
        return
    fields = type(section).model_fields
    given = {name: getattr(section, name) for name in names if getattr(section, name) != fields[name].default}
    if given:
        preset = getattr(section, "preset", None)
        source = "" if preset is None else f" (or student.preset {preset}, which sets them)"
        raise KdtrainError(
            f"student.path {section.path} has its own {has}, so "
            + ", ".join(f"student.{name} {value}" for name, value in given.items())
            + f" would do nothing; leave them out{source}, or leave out student.path for a new student"
        )
