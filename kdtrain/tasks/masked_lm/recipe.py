"""The recipe of `task: masked_lm`: the same YAML, the same checks and overrides as for the other tasks."""

from dataclasses import dataclass, field
from typing import Any, Literal

from kdtrain.errors import KdtrainError
from kdtrain.recipe import StudentRecipe, TrainingRecipe
from kdtrain.recipe.files import build
from kdtrain.recipe.presets import with_presets
from kdtrain.recipe.sections import check_seed, option

TASK = "masked_lm"


@dataclass(frozen=True, kw_only=True)
class MaskedDataRecipe:
    """The code to learn from, without any labels."""

    kind: Literal["text", "exceptions"] = option(
        "text",
        "text: whole documents; exceptions: Python functions with one exception name hidden, which is to be told too",
    )
    train: tuple[str, ...] = option(
        (),
        "folders of source code, .txt, .jsonl, .csv or .parquet files, or ids of data sets on the hub; for exceptions "
        "folders of Python code, by default what is installed here under a permissive licence",
    )
    held_out: float = option(0.01, "share of the documents that only measure (text)")
    suffixes: tuple[str, ...] = option((".py",), "endings of the files taken from a folder (text)")
    split: str = option("train", "split of a data set on the hub (text)")
    text: str = option("code", "column that holds the code, in files and data sets (text)")
    site_packages: tuple[str, ...] = option(
        (), "further folders of installed packages, beside those of this Python (exceptions)"
    )

    def __post_init__(self) -> None:
        if self.kind == "text" and not self.train:
            raise KdtrainError("data.train is missing: name folders of source code, files or data sets")
        if not 0 < self.held_out < 1:
            raise KdtrainError(f"data.held_out is a share and lies between 0 and 1, got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class MaskedTrainingRecipe(TrainingRecipe):
    """Steps, optimizer and how often to look."""

    best_metric: Literal["loss"] = option("loss", "what the best checkpoint is best in: the held-out loss")


@dataclass(frozen=True, kw_only=True)
class MaskedRecipe:
    """One run, whole."""

    task: Literal["masked_lm"] = option(TASK, "what is trained")
    data: MaskedDataRecipe
    student: StudentRecipe = field(default_factory=StudentRecipe, metadata={"help": StudentRecipe.__doc__})
    training: MaskedTrainingRecipe = field(
        default_factory=MaskedTrainingRecipe, metadata={"help": MaskedTrainingRecipe.__doc__}
    )
    output: str = option("runs/run", "folder of the run")
    seed: int = option(0, "first weights, order of the rows, which tokens are hidden")

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.student.architecture != "roberta":
            raise KdtrainError(
                f"task masked_lm trains encoders of architecture roberta, or the one at student.path, got student.architecture {self.student.architecture}"
            )


def masked_recipe_from_dict(content: dict[str, Any]) -> MaskedRecipe:
    """A recipe from plain dicts; missing fields take the values of the student's preset, then their defaults."""
    return build(MaskedRecipe, with_presets(content))
