"""What a recipe holds: frozen dataclasses, one for each section."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from kdtrain.errors import KdtrainError

Value = TypeVar("Value")


def option(default: Value, help: str) -> Value:
    """A field with its default and the sentence that explains it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Which rows to train and to measure on: either one folder, or files with a column mapping."""

    path: str | None = option(
        None, "folder with dataset.json, train.jsonl, valid.jsonl, test.jsonl[, unlabelled.jsonl]"
    )
    train: str | None = option(None, "training file (.jsonl, .csv or .parquet), in place of `path`")
    valid: str | None = option(None, "validation file, chooses the best checkpoint")
    test: str | None = option(
        None, "test file, measured once at the end; the validation file where there is none"
    )
    unlabelled: str | None = option(None, "file of rows without labels, scored by the teacher only")
    text: str = option("code", "column that holds the text")
    second: str | None = option(None, "column that holds the second text of a pair, for tasks over pairs")
    label: str = option("label", "column that holds the label: a number, or a name out of `classes`")
    classes: tuple[str, ...] = option((), "class names in order of their numbers; needed with files")
    focus: str | None = option(None, "marker in the text that a cut row is centred on, such as __HOLE__")
    limit: int | None = option(
        None, "use only this many labelled training rows, the ones with the smallest content hashes"
    )
    use_unlabelled: bool = option(True, "whether a method with a teacher also trains on the unlabelled rows")

    def __post_init__(self) -> None:
        positive(self, "data", "limit")
        if (self.path is None) == (self.train is None):
            raise KdtrainError("data needs either data.path (a folder) or data.train (a file), and not both")
        if self.path is not None:
            beside = ("valid", "test", "unlabelled", "classes")
            for name in (name for name in beside if getattr(self, name)):
                raise KdtrainError(
                    f"data.path is a folder that brings its own {name}, so data.{name} would do nothing; "
                    f"leave it out, or name all files (data.train, data.valid, ...) instead of data.path"
                )
        if self.train is not None and self.valid is None:
            raise KdtrainError("data.train needs data.valid beside it: the best checkpoint is chosen there")
        if self.train is not None and len(self.classes) < 2:
            raise KdtrainError(f"data.train needs data.classes, at least two names, got {list(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            raise KdtrainError(f"data.classes must be different names, got {list(self.classes)}")


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """The model that is trained: its shape, or where to start from."""

    preset: str | None = option(
        None,
        "shape by name, such as roberta-7M or bigru-1.5M (kdtrain/recipe/presets.py); fields given here win",
    )
    architecture: Literal["roberta", "bigru"] = option("roberta", "encoder of a new student")
    path: str | None = option(
        None, "start from this folder or hub id (weights, shape, tokenizer) instead of anew"
    )
    tokenizer: str | None = option(
        None, "folder of a finished tokenizer; without it one is trained on the task's code"
    )
    vocab_size: int = option(5000, "tokens of the byte-level BPE that is trained")
    hidden_size: int = option(128, "width D; of one direction for bigru")
    layers: int = option(2, "encoder layers")
    heads: int = option(4, "attention heads (roberta)")
    intermediate_size: int = option(512, "width inside the feed-forward layers (roberta)")
    max_length: int = option(256, "tokens kept of one row, special tokens included")
    insert: tuple[str, ...] | None = option(
        None,
        "tokens behind the first one of every row, as for teacher.insert: UniXcoder's mode where its vocabulary has it",
    )
    dropout: float = option(
        0.1, "dropout of embeddings, layers and head of a new student; student.path brings its own"
    )
    attention_dropout: float = option(
        0.0, "dropout of attention weights of a new student (roberta); above 0 it halves the speed on a CPU"
    )

    def __post_init__(self) -> None:
        positive(self, "student", "hidden_size", "layers", "heads", "intermediate_size")
        only_of_new_students(
            self, "architecture", "vocab_size", "hidden_size", "layers", "heads", "intermediate_size"
        )
        only_of_new_students(self, "dropout", "attention_dropout", brings="dropout")
        if self.vocab_size < 300:
            raise KdtrainError(
                f"student.vocab_size must be at least 300 (256 bytes and the special tokens), got {self.vocab_size}"
            )
        if self.max_length < 8:
            raise KdtrainError(f"student.max_length must be at least 8, got {self.max_length}")
        if self.architecture == "roberta" and self.hidden_size % self.heads:
            raise KdtrainError(
                f"student.hidden_size must be a multiple of student.heads, got {self.hidden_size} and {self.heads}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise KdtrainError(f"student.{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """The large model. It is only ever read; its outputs are stored once and used by every epoch and run."""

    path: str | None = option(None, "folder or hub id of a sequence classifier with the task's classes")
    max_length: int | None = option(
        None, "tokens the teacher sees of one row; by default what it was made for, at most 512"
    )
    cache: str | None = option(
        None, "folder of the stored outputs, shared by runs; <output>/teacher_cache by default"
    )
    class_order: tuple[int, ...] = option(
        (),
        "which of the teacher's outputs is each class of the task, such as [1, 0]; by default their own order",
    )
    insert: tuple[str, ...] | None = option(
        None,
        "tokens behind the first one of every row; by default UniXcoder's mode where its vocabulary has it",
    )
    layers: tuple[int, ...] = option(
        (), "layers whose first-token states are stored; by default those the method needs"
    )
    sequences: bool = option(
        False,
        "store every token's states, not the first one's only, even if the method does not need them (ckd does)",
    )
    dtype: Literal["float32", "float16"] = option(
        "float16", "how stored features are rounded; logits stay float32"
    )
    batch_tokens: int = option(16384, "tokens in one teacher forward pass; bounds its memory")

    def __post_init__(self) -> None:
        positive(self, "teacher", "batch_tokens")
        if self.max_length is not None and self.max_length < 8:
            raise KdtrainError(f"teacher.max_length must be at least 8, got {self.max_length}")
        if any(layer < 0 for layer in self.layers):
            raise KdtrainError(f"teacher.layers must be 0 (embeddings) or more, got {list(self.layers)}")


@dataclass(frozen=True, kw_only=True)
class MethodRecipe:
    """How the student learns. The loss of a batch is the sum of weight * term over its rows, divided by their number."""

    name: str = option(
        "ft",
        "ft (labels only), kd (teacher's soft labels), kd_features (and its hidden states), dist, pkd or ckd",
    )
    preset: str | None = option(
        None,
        "study: the values of arXiv 2508.15423 for this method (kdtrain/recipe/presets.py); fields given win",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "forward_kl", "between the softened probabilities of teacher and student"
    )
    temperature: float = option(
        2.0, "T that softens both sides; value and gradient are multiplied by T squared"
    )
    kd_weight: float = option(1.0, "weight of the divergence")
    ce_weight: float = option(1.0, "weight of the cross-entropy with the labels")
    inter_weight: float = option(1.0, "weight of the correlation across classes, row by row (dist)")
    intra_weight: float = option(
        1.0, "weight of the correlation across the whole batch, class by class (dist)"
    )
    feature_weight: float = option(1.0, "weight of the hidden-state loss (kd_features, pkd, ckd)")
    layer_weight: float = option(
        1.0, "weight of the relations between layers beside those between tokens (ckd)"
    )
    window: int = option(10, "neighbours on each side that a token is compared with (ckd)")
    layer_map: tuple[tuple[int, int], ...] = option(
        (),
        "pairs [student layer, teacher layer]; by default every student layer, spread evenly over the teacher's",
    )
    project: Literal["student", "teacher"] = option(
        "student", "which side is mapped onto the width of the other (kd_features; in pkd it is the teacher)"
    )

    def __post_init__(self) -> None:
        positive(self, "method", "temperature", "window")
        weights = ("kd_weight", "ce_weight", "inter_weight", "intra_weight", "feature_weight", "layer_weight")
        not_negative(self, "method", *weights)
        finite(self, "method", "temperature", *weights)


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Steps, optimizer and how often to look."""

    epochs: int = option(5, "passes over the rows")
    max_steps: int | None = option(None, "optimizer steps of the whole run; wins over epochs")
    batch_size: int = option(32, "rows of one optimizer step, over all pieces and processes")
    accumulation: int = option(
        1, "pieces a batch is cut into on each process; changes memory, never the result"
    )
    learning_rate: float = option(5e-4, "highest rate of AdamW")
    weight_decay: float = option(0.01, "decay of matrices; biases and norms are left alone")
    warmup: float = option(0.1, "share of the steps in which the rate rises from 0")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = option(
        "linear", "what the rate does after that"
    )
    clip_norm: float = option(1.0, "largest norm of the whole gradient; .inf leaves it alone")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "precision of the student's matrix products")
    evaluate_every: int | None = option(
        None, "steps between evaluations and checkpoints; each epoch by default"
    )
    save_steps: int | None = option(None, "steps between checkpoints; as often as evaluations by default")
    early_stopping_patience: int | None = option(
        None, "stop after this many evaluations in a row without a better one; never by default"
    )
    ddp_timeout: int = option(
        600, "seconds after which a process that does not answer the others in training ends the run"
    )
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    best_metric: Literal["accuracy", "f1", "top3", "macro_f1", "loss"] = option(
        "accuracy", "what the best checkpoint is best in"
    )

    def __post_init__(self) -> None:
        positive(self, "training", "epochs", "max_steps", "batch_size", "accumulation", "learning_rate")
        positive(self, "training", "clip_norm", "evaluate_every", "log_every")
        positive(self, "training", "save_steps", "early_stopping_patience", "ddp_timeout")
        if not 0 <= self.warmup < 1:
            raise KdtrainError(
                f"training.warmup is a share of the steps and lies in [0, 1), got {self.warmup}"
            )
        not_negative(self, "training", "weight_decay")
        if self.accumulation > self.batch_size:
            raise KdtrainError(
                f"training.accumulation cuts a batch of training.batch_size rows into pieces and cannot be larger, "
                f"got {self.accumulation} and {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole."""

    data: DataRecipe
    student: StudentRecipe = field(default_factory=StudentRecipe, metadata={"help": StudentRecipe.__doc__})
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe, metadata={"help": TeacherRecipe.__doc__})
    method: MethodRecipe = field(default_factory=MethodRecipe, metadata={"help": MethodRecipe.__doc__})
    training: TrainingRecipe = field(
        default_factory=TrainingRecipe, metadata={"help": TrainingRecipe.__doc__}
    )
    output: str = option("runs/run", "folder of the run")
    seed: int = option(0, "first weights, order of the rows, dropout")

    def __post_init__(self) -> None:
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that the generators of numpy and torch do not take."""
    if not 0 <= seed < 2**32:
        raise KdtrainError(f"seed must lie in [0, 2^32), got {seed}")


def positive(section: Any, prefix: str, *names: str) -> None:
    """Refuse zero, negative numbers and NaN in the named fields (None is left alone)."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise KdtrainError(f"{prefix}.{name} must be greater than 0, got {value}")


def not_negative(section: Any, prefix: str, *names: str) -> None:
    """Refuse negative numbers and NaN in the named fields (None is left alone)."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= 0:
            raise KdtrainError(f"{prefix}.{name} must be 0 or more, got {value}")


def finite(section: Any, prefix: str, *names: str) -> None:
    """Refuse infinity in the named fields."""
    for name in names:
        if getattr(section, name) == float("inf"):
            raise KdtrainError(f"{prefix}.{name} must be finite, got inf")


def only_of_new_students(section: Any, *names: str, brings: str = "shape") -> None:
    """Refuse values of these fields beside `path`: a checkpoint `brings` its own, and they would do nothing."""
    if section.path is None:
        return
    given = {
        name: getattr(section, name)
        for name in names
        if getattr(section, name) != type(section).__dataclass_fields__[name].default
    }
    if given:
        preset = getattr(section, "preset", None)
        source = "" if preset is None else f" (or student.preset {preset}, where they come from)"
        raise KdtrainError(
            f"student.path {section.path} brings its own {brings}, so "
            + ", ".join(f"student.{name} {value}" for name, value in given.items())
            + f" would do nothing; leave them out{source}, or leave out student.path for a new student"
        )
