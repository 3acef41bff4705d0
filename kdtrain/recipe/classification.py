"""The recipe of `task: classification`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import NOT_NEGATIVE, POSITIVE, Flag, MethodOptions, Section, Text, Whole
from kdtrain.recipe.run import METHOD, OUTPUT, SEED, DistillationRecipe
from kdtrain.recipe.students import LENGTH, StudentSection
from kdtrain.recipe.training import TrainingSection


class DataSection(Section):
    """Rows to train and to measure on: either one folder, or files with a column mapping."""

    path: Text | None = Field(
        default=None,
        description="folder with dataset.json, train.jsonl, valid.jsonl, test.jsonl[, unlabelled.jsonl]",
    )
    train: Text | None = Field(
        default=None, description="training file (.jsonl, .csv or .parquet), in place of `path`"
    )
    valid: Text | None = Field(default=None, description="validation file, which selects the best checkpoint")
    test: Text | None = Field(
        default=None, description="test file, measured once at the end; by default the validation file"
    )
    unlabelled: Text | None = Field(
        default=None, description="file of rows without labels, used only by methods with a teacher"
    )
    text: Text = Field(default="code", description="column of the text")
    second: Text | None = Field(default=None, description="column of the second text, for tasks over pairs")
    label: Text = Field(default="label", description="column of the label: a number, or a name in `classes`")
    classes: tuple[Text, ...] = Field(
        default=(), description="class names in order of their numbers; needed with files"
    )
    focus: Text | None = Field(
        default=None, description="marker in the text that a truncated row is centred on, such as __HOLE__"
    )
    limit: Annotated[Whole, POSITIVE] | None = Field(
        default=None,
        description="use only this many labelled training rows, those with the smallest content hashes",
    )
    use_unlabelled: Flag = Field(
        default=True, description="whether a method with a teacher also trains on the unlabelled rows"
    )

    @model_validator(mode="after")
    def _folder_or_files(self) -> Self:
        if (self.path is None) == (self.train is None):
            raise KdtrainError("data needs either data.path (a folder) or data.train (a file), and not both")
        if self.path is not None:
            for name in ("valid", "test", "unlabelled", "classes"):
                if getattr(self, name):
                    raise KdtrainError(
                        f"data.path is a folder that has its own {name}, so data.{name} would do nothing; "
                        "leave it out, or name all files (data.train, data.valid, ...) instead of data.path"
                    )
        if self.train is not None and self.valid is None:
            raise KdtrainError("data.train needs data.valid too, which selects the best checkpoint")
        if self.train is not None and len(self.classes) < 2:
            raise KdtrainError(f"data.train needs data.classes, at least two names, got {list(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            raise KdtrainError(f"data.classes must be different names, got {list(self.classes)}")
        return self


class TeacherSection(Section):
    """The large model. It is never trained; its outputs are stored once and used by every epoch and run."""

    path: Text | None = Field(
        default=None, description="folder or hub id of a sequence classifier with the classes of the data"
    )
    max_length: Annotated[Whole, LENGTH] | None = Field(
        default=None,
        description="tokens of one row that the teacher reads; by default as many as it has positions for, at most 512",
    )
    cache: Text | None = Field(
        default=None,
        description="folder of the stored outputs, shared by runs; by default <output>/teacher_cache",
    )
    class_order: tuple[Whole, ...] = Field(
        default=(),
        description="which output of the teacher is each class of the data, such as [1, 0]; by default in order",
    )
    insert: tuple[Text, ...] | None = Field(
        default=None,
        description="tokens inserted after the first token of every row; by default UniXcoder's mode where the "
        "vocabulary has it",
    )
    layers: tuple[Annotated[Whole, NOT_NEGATIVE], ...] = Field(
        default=(),
        description="layers whose first-token states are stored, 0 is the embeddings; by default those the method needs",
    )
    sequences: Flag = Field(
        default=False,
        description="store the states of every token even if the method does not need them (ckd does)",
    )
    dtype: Literal["float32", "float16"] = Field(
        default="float16", description="dtype of stored states; logits stay float32"
    )
    batch_tokens: Annotated[Whole, POSITIVE] = Field(
        default=16384, description="tokens in one forward pass of the teacher; bounds its memory"
    )


class ClassificationTraining(TrainingSection):
    """Steps, optimizer, and how often to evaluate, save and log."""

    metric_for_best_model: Literal["accuracy", "f1", "top3", "macro_f1", "loss"] = Field(
        default="accuracy", description="validation metric that selects the best checkpoint"
    )


class ClassificationRecipe(DistillationRecipe):
    """A classifier of one or two texts."""

    task: Literal["classification"] = Field(default="classification", description="what is trained")
    data: DataSection = Field(description="rows with classes")
    student: StudentSection = Field(default=StudentSection(), description="the encoder that is trained")
    teacher: TeacherSection = Field(default=TeacherSection(), description="the large model")
    method: tuple[MethodOptions, ...] = METHOD
    training: ClassificationTraining = Field(
        default=ClassificationTraining(), description="steps, optimizer, and how often to evaluate"
    )
    output: Text = OUTPUT
    seed: Whole = SEED
