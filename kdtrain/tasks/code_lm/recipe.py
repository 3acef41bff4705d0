"""The recipe of `task: code_lm`: the same YAML, the same checks and overrides as for the other tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdtrain.errors import KdtrainError
from kdtrain.recipe import TrainingRecipe
from kdtrain.recipe.files import build, read_recipe
from kdtrain.recipe.sections import check_seed, finite, not_negative, only_of_new_students, option, positive

TASK = "code_lm"


@dataclass(frozen=True, kw_only=True)
class LanguageDataRecipe:
    """Documents to train on: source code, or prompts with completions, or conversations."""

    train: str = option(
        "",
        "a folder of source code, a .txt, .jsonl, .csv or .parquet file, or the id of a data set on the hub",
    )
    valid: str | None = option(None, "the same for measuring; without it a part of `train` is held out")
    held_out: float = option(0.02, "share of the documents held out when there is no `valid`")
    suffixes: tuple[str, ...] = option((".py",), "endings of the files taken from a folder of source code")
    split: str = option("train", "split of a data set on the hub")
    text: str = option("text", "column of plain documents: every token counts")
    prompt: str = option("prompt", "column of prompts; with `completion`: only the completion counts")
    completion: str = option("completion", "column of completions")
    messages: str = option("messages", "column of conversations: only what the assistant says counts")
    max_length: int = option(1024, "tokens of one row; longer documents go on in another row")
    packing: bool = option(True, "put several documents into one row; they do not see each other")
    store: str | None = option(
        None, "folder to keep the tokenized rows in and to map them from, for data larger than memory"
    )

    def __post_init__(self) -> None:
        positive(self, "data", "max_length")
        if not self.train:
            raise KdtrainError("data.train is missing: name a folder of source code, a file or a data set")
        if not 0 < self.held_out < 1:
            raise KdtrainError(f"data.held_out is a share and lies between 0 and 1, got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class LanguageStudentRecipe:
    """The small model: where to start from, or the shape of a new one."""

    path: str | None = option(None, "start from this folder or hub id (weights, shape, tokenizer)")
    tokenizer: str | None = option(
        None, "folder or hub id of the tokenizer of a new student; by default the teacher's"
    )
    architecture: Literal["llama", "qwen3"] = option("llama", "family of a new student")
    hidden_size: int = option(256, "width D")
    layers: int = option(4, "decoder layers")
    heads: int = option(4, "attention heads; also of keys and values")
    intermediate_size: int = option(768, "width inside the feed-forward layers")
    tie_embeddings: bool = option(True, "whether the head is the embedding table")
    frozen_head: bool = option(
        False, "leave the head as it is, and with it the embeddings when they are one table"
    )
    lora_rank: int = option(
        0,
        "train low-rank adapters of this rank and nothing else (needs peft and student.path); 0 trains all weights",
    )
    lora_alpha: float = option(16.0, "the adapters' part is multiplied by lora_alpha / lora_rank")
    lora_dropout: float = option(0.0, "dropout before the adapters")
    lora_targets: tuple[str, ...] = option(
        (), "names of the layers that get adapters, such as q_proj; by default all linear layers but the head"
    )

    def __post_init__(self) -> None:
        positive(self, "student", "hidden_size", "layers", "heads", "intermediate_size", "lora_alpha")
        only_of_new_students(
            self, "architecture", "hidden_size", "layers", "heads", "intermediate_size", "tie_embeddings"
        )
        if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1:
            raise KdtrainError(
                "student.lora_rank must be 0 or more and student.lora_dropout in [0, 1), got "
                f"{self.lora_rank} and {self.lora_dropout}"
            )
        if self.lora_rank and self.path is None:
            raise KdtrainError(
                f"student.lora_rank is {self.lora_rank}, but a new student has nothing to adapt; name a checkpoint in "
                "student.path or set student.lora_rank: 0"
            )
        if self.hidden_size % (2 * self.heads):
            raise KdtrainError(
                f"student.hidden_size must be an even multiple of student.heads, got {self.hidden_size} and {self.heads}"
            )


@dataclass(frozen=True, kw_only=True)
class LanguageTeacherRecipe:
    """The large model. It is only ever read."""

    path: str | None = option(
        None, "folder or hub id of a causal language model; with signal shards the folder of the shards"
    )
    signal: Literal["online", "hidden", "topk", "cross_term", "shards"] = option(
        "online",
        "run the teacher in every step, or store once what enters its head (hidden: exact), its top_k tokens (topk), or "
        "all that forward KL needs for a student whose head is not trained (cross_term: exact); or read the tokens that "
        "another program kept (shards)",
    )
    source: Literal["local", "server"] = option(
        "local",
        "where the teacher runs: here, or on vLLM servers (url); of a served teacher, path is read for configuration, tokenizer "
        "and head only",
    )
    url: str | None = option(
        None, "address of the vLLM server, such as http://127.0.0.1:8000; several with commas between"
    )
    served_name: str | None = option(
        None, "name that the servers serve the model by; by default the only one they serve"
    )
    targets: Literal["hidden", "topk"] = option(
        "hidden",
        "what servers are asked for in every step (source server, signal online): hidden states (exact) or top_k log-probabilities",
    )
    cache: str | None = option(
        None, "folder of the stored outputs, shared by runs; <output>/teacher_cache by default"
    )
    top_k: int = option(64, "tokens kept of each distribution (signal topk)")
    tail: Literal["renormalize", "bucket"] = option(
        "bucket",
        "the rest of the distribution: left out, or one category of its own (signals topk and shards)",
    )
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "how stored hidden states are rounded")
    precision: Literal["fp32", "bf16"] = option("fp32", "precision of the teacher's weights and products")
    batch_tokens: int = option(8192, "tokens in one forward pass while the cache is built; bounds its memory")

    def __post_init__(self) -> None:
        positive(self, "teacher", "top_k", "batch_tokens")
        if self.source == "local":
            for name in ("url", "served_name"):
                if getattr(self, name) is not None:
                    raise KdtrainError(
                        f"teacher.{name} does nothing with teacher.source local; set teacher.source: server"
                    )
            if self.targets != "hidden":
                raise KdtrainError(
                    f"teacher.targets {self.targets} does nothing with teacher.source local; set teacher.source: server, or "
                    f"teacher.signal: {self.targets}"
                )
        elif self.signal == "shards":
            raise KdtrainError(
                "teacher.signal shards reads what another program stored and asks no server; set teacher.source: local"
            )
        elif self.signal != "online" and self.targets != "hidden":
            raise KdtrainError(
                f"teacher.targets {self.targets} is for teacher.signal online; teacher.signal {self.signal} says what is stored"
            )

    @property
    def asked(self) -> Literal["hidden", "topk"]:
        """What servers answer."""
        return self.targets if self.signal == "online" else "topk" if self.signal == "topk" else "hidden"

    @property
    def runs_here(self) -> bool:
        """Whether layers of the teacher run on this machine while the student trains."""
        return self.signal == "online" and self.source == "local"


@dataclass(frozen=True, kw_only=True)
class LanguageMethodRecipe:
    """How the student learns: ce_weight * CE + kd_weight * T^2 * divergence [+ losses between inner layers] per token."""

    name: Literal["ft", "kd", "kd_features"] = option(
        "kd",
        "ft (next tokens only), kd (and the teacher's distribution), kd_features (and its inner layers)",
    )
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"
    ] = option("forward_kl", "between the distributions of teacher and student")  # fmt: skip
    beta: float = option(0.5, "weight of the teacher in the mixture of jsd")
    alpha: float = option(0.1, "weight of the mixed-in side of skew_kl and skew_reverse_kl")
    temperature: float = option(
        1.0, "T that softens both sides; value and gradient are multiplied by T squared"
    )
    kd_weight: float = option(1.0, "weight of the divergence")
    ce_weight: float = option(0.5, "weight of the cross-entropy with the next token")
    last_temperature: float | None = option(
        None, "temperature at the last step; changes evenly from `temperature`"
    )
    last_kd_weight: float | None = option(None, "kd_weight at the last step; changes evenly from `kd_weight`")
    last_ce_weight: float | None = option(None, "ce_weight at the last step; changes evenly from `ce_weight`")
    features: tuple[Literal["hidden", "attention", "queries", "keys", "values"], ...] = option(
        ("hidden",),
        "what kd_features compares of mapped layers: hidden (states, squared error behind a learned projection), "
        "attention (KL of the attention maps), queries, keys, values (KL of their relations, token to token)",
    )
    feature_weight: float = option(1.0, "weight of the hidden-state loss (kd_features)")
    relation_weight: float = option(
        1.0, "weight of the sum of the KLs of attention, queries, keys and values (kd_features)"
    )
    relation_heads: int | None = option(
        None,
        "heads that queries, keys and values are cut into for their relations; by default the models' own",
    )
    layer_map: tuple[tuple[int, int], ...] = option(
        (), "pairs [student layer, teacher layer]; by default the last of both"
    )

    def __post_init__(self) -> None:
        positive(self, "method", "temperature", "last_temperature", "relation_heads")
        weights = (
            "kd_weight",
            "ce_weight",
            "last_kd_weight",
            "last_ce_weight",
            "feature_weight",
            "relation_weight",
        )
        not_negative(self, "method", *weights)
        finite(self, "method", "temperature", "last_temperature", *weights)
        if not self.features or len(set(self.features)) < len(self.features):
            raise KdtrainError(
                f"method.features must name one or more of hidden, attention, queries, keys, values, each once, got "
                f"{list(self.features)}"
            )


@dataclass(frozen=True, kw_only=True)
class LanguageTrainingRecipe(TrainingRecipe):
    """Steps, optimizer and how often to look."""

    best_metric: Literal["loss"] = option(
        "loss", "what the best checkpoint is best in: held-out cross-entropy"
    )
    checkpointing: bool = option(
        False, "recompute the student's layers in backward: less memory, a third more time"
    )


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """One run, whole."""

    task: Literal["code_lm"] = option(TASK, "what is trained")
    data: LanguageDataRecipe
    student: LanguageStudentRecipe = field(
        default_factory=LanguageStudentRecipe, metadata={"help": LanguageStudentRecipe.__doc__}
    )
    teacher: LanguageTeacherRecipe = field(
        default_factory=LanguageTeacherRecipe, metadata={"help": LanguageTeacherRecipe.__doc__}
    )
    method: LanguageMethodRecipe = field(
        default_factory=LanguageMethodRecipe, metadata={"help": LanguageMethodRecipe.__doc__}
    )
    training: LanguageTrainingRecipe = field(
        default_factory=LanguageTrainingRecipe, metadata={"help": LanguageTrainingRecipe.__doc__}
    )
    output: str = option("runs/run", "folder of the run")
    seed: int = option(0, "first weights, order of the rows, dropout")

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.method.name != "ft" and self.teacher.path is None:
            raise KdtrainError(
                f"method {self.method.name} needs a teacher; set teacher.path to a folder or hub id, or method.name: ft"
            )
        if self.method.name == "kd_features" and self.teacher.signal != "online":
            raise KdtrainError(
                f"method kd_features reads inner layers of the teacher, which teacher.signal {self.teacher.signal} does not "
                "store; set teacher.signal: online"
            )
        if self.method.name == "kd_features" and self.teacher.source == "server":
            raise KdtrainError(
                "method kd_features reads inner layers of the teacher, which a server does not answer; set teacher.source: local"
            )
        top_k = (
            self.teacher.asked == "topk" if self.teacher.source == "server" else self.teacher.signal == "topk"
        )
        kept = (top_k or self.teacher.signal == "shards") and self.teacher.tail == "renormalize"
        if kept and self.method.name == "kd" and self.method.divergence == "reverse_kl":
            raise KdtrainError(
                "method.divergence reverse_kl is infinite where teacher.tail renormalize gives the tokens that were not kept the "
                "probability 0; set teacher.tail: bucket"
            )
        if self.teacher.signal == "cross_term" and self.method.name == "kd":
            if self.method.divergence != "forward_kl":
                raise KdtrainError(
                    f"teacher.signal cross_term stands for forward_kl only, got method.divergence {self.method.divergence}; "
                    "set teacher.signal: hidden"
                )
            if self.method.last_temperature not in (None, self.method.temperature):
                raise KdtrainError(
                    "teacher.signal cross_term is stored for one temperature, but method.last_temperature changes it; set "
                    "teacher.signal: hidden"
                )


def language_recipe_from_dict(content: dict[str, Any]) -> LanguageRecipe:
    """A recipe from plain dicts; missing fields take their defaults."""
    return build(LanguageRecipe, content)


def load_language_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LanguageRecipe:
    """Read a YAML recipe of this task; refuses what `load_recipe` refuses."""
    return language_recipe_from_dict(read_recipe(path, overrides))
