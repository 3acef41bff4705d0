"""The recipe of `task: code_lm`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import (
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SHARE,
    Flag,
    MethodOptions,
    Number,
    Section,
    Text,
    Whole,
)
from kdtrain.recipe.run import METHOD, OUTPUT, SEED, DistillationRecipe
from kdtrain.recipe.students import only_of_new_students
from kdtrain.recipe.training import TrainingSection


class LanguageDataSection(Section):
    """Documents to train on: source code, prompts with completions, or conversations."""

    train: Text = Field(
        description="a folder of source code, a .txt, .jsonl, .csv or .parquet file, or the id of a data set on the hub"
    )
    valid: Text | None = Field(
        default=None,
        description="the same for validation; by default a share of the documents of `train` is held out",
    )
    held_out: Annotated[Number, PART] = Field(
        default=0.02, description="share of the documents held out when there is no `valid`"
    )
    suffixes: tuple[Text, ...] = Field(
        default=(".py",), description="endings of the files read from a folder of source code"
    )
    split: Text = Field(default="train", description="split of a data set on the hub")
    text: Text = Field(default="text", description="column of plain documents: every token counts")
    prompt: Text = Field(
        default="prompt", description="column of prompts; with `completion` only the completion counts"
    )
    completion: Text = Field(default="completion", description="column of completions")
    messages: Text = Field(
        default="messages",
        description="column of conversations, lists of {role, content}: the tokenizer's chat template is applied and only "
        "the assistant's tokens count",
    )
    max_length: Annotated[Whole, POSITIVE] = Field(
        default=1024, description="tokens of one row; a longer document is split over several rows"
    )
    packing: Flag = Field(
        default=True,
        description="put several documents into one row; they do not attend to each other",
    )
    store: Text | None = Field(
        default=None,
        description="folder of the tokenized rows, memory-mapped, for data larger than memory",
    )

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not self.train:
            raise KdtrainError("data.train is missing: name a folder of source code, a file or a data set")
        return self


class LanguageStudentSection(Section):
    """The small model: the checkpoint to start from, or the shape of a new one."""

    path: Text | None = Field(
        default=None, description="start from this folder or hub id (weights, shape, tokenizer)"
    )
    tokenizer: Text | None = Field(
        default=None,
        description="folder or hub id of the tokenizer of a new student; by default the teacher's",
    )
    architecture: Literal["llama", "qwen3"] = Field(default="llama", description="family of a new student")
    hidden_size: Annotated[Whole, POSITIVE] = Field(default=256, description="width D")
    layers: Annotated[Whole, POSITIVE] = Field(default=4, description="decoder layers")
    heads: Annotated[Whole, POSITIVE] = Field(
        default=4, description="attention heads; as many of keys and values"
    )
    intermediate_size: Annotated[Whole, POSITIVE] = Field(
        default=768, description="width inside the feed-forward layers"
    )
    tie_embeddings: Flag = Field(default=True, description="whether the head is the embedding table")
    frozen_head: Flag = Field(
        default=False,
        description="do not train the head, nor the embeddings when they are one table",
    )
    lora_rank: Annotated[Whole, NOT_NEGATIVE] = Field(
        default=0,
        description="train low-rank adapters of this rank and nothing else (needs peft and student.path); 0 trains all weights",
    )
    lora_alpha: Annotated[Number, POSITIVE] = Field(
        default=16.0, description="the adapters are scaled by lora_alpha / lora_rank"
    )
    lora_dropout: Annotated[Number, SHARE] = Field(default=0.0, description="dropout before the adapters")
    lora_targets: tuple[Text, ...] = Field(
        default=(),
        description="names of the layers that get adapters, such as q_proj; by default all linear layers but the head",
    )

    @model_validator(mode="after")
    def _shape_of_new_students(self) -> Self:
        only_of_new_students(
            self, "architecture", "hidden_size", "layers", "heads", "intermediate_size", "tie_embeddings"
        )
        if self.lora_rank and self.path is None:
            raise KdtrainError(
                f"student.lora_rank is {self.lora_rank}, but a new student has nothing to adapt; name a checkpoint in "
                "student.path or set student.lora_rank: 0"
            )
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if not self.lora_rank and getattr(self, name) != type(self).model_fields[name].default:
                raise KdtrainError(
                    f"student.{name} does nothing without adapters; set student.lora_rank, or leave it out"
                )
        if self.hidden_size % (2 * self.heads):
            raise KdtrainError(
                f"student.hidden_size must be an even multiple of student.heads, got {self.hidden_size} and {self.heads}"
            )
        return self


class LanguageTeacherSection(Section):
    """The large model. It is never trained."""

    path: Text | None = Field(
        default=None,
        description="folder or hub id of a causal language model; with signal shards the folder of the shards",
    )
    signal: Literal["online", "hidden", "topk", "cross_term", "shards"] = Field(
        default="online",
        description="online runs the teacher in every step. Stored once: hidden (the input of its head, exact), topk (its "
        "top_k log-probabilities), cross_term (exact for forward KL and a student whose head is not trained). shards reads "
        "log-probabilities that another program stored",
    )
    source: Literal["local", "server"] = Field(
        default="local",
        description="where the teacher runs: here, or on vLLM servers (url); of a served teacher only configuration, "
        "tokenizer and head are read from path",
    )
    url: Text | None = Field(
        default=None,
        description="address of the vLLM server, such as http://127.0.0.1:8000; several separated by commas",
    )
    served_name: Text | None = Field(
        default=None, description="name of the model on the servers; by default the only one they serve"
    )
    targets: Literal["hidden", "topk"] = Field(
        default="hidden",
        description="what servers are asked for in every step (source server, signal online): hidden states (exact) or top_k "
        "log-probabilities",
    )
    cache: Text | None = Field(
        default=None,
        description="folder of the stored outputs, shared by runs; by default <output>/teacher_cache",
    )
    top_k: Annotated[Whole, POSITIVE] = Field(
        default=64, description="entries stored of each distribution (signal topk)"
    )
    tail: Literal["renormalize", "bucket"] = Field(
        default="bucket",
        description="the entries that are not stored: dropped, or one bucket (signals topk and shards)",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="dtype of stored hidden states"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="precision of the teacher's weights and matmuls"
    )
    batch_tokens: Annotated[Whole, POSITIVE] = Field(
        default=8192, description="tokens in one forward pass while outputs are stored; bounds its memory"
    )

    @model_validator(mode="after")
    def _server_fields(self) -> Self:
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
        return self

    @property
    def asked(self) -> Literal["hidden", "topk"]:
        """What servers answer."""
        return self.targets if self.signal == "online" else "topk" if self.signal == "topk" else "hidden"

    @property
    def runs_here(self) -> bool:
        """Whether layers of the teacher run on this machine while the student trains."""
        return self.signal == "online" and self.source == "local"

    @property
    def keeps_top_k(self) -> bool:
        """Whether only top-k entries of the distribution of the teacher are known."""
        served = self.source == "server" and self.asked == "topk"
        return served or self.signal in ("topk", "shards")


class LanguageTraining(TrainingSection):
    """Steps, optimizer, and how often to evaluate, save and log."""

    metric_for_best_model: Literal["loss"] = Field(
        default="loss",
        description="validation metric that selects the best checkpoint: held-out cross entropy",
    )


class LanguageRecipe(DistillationRecipe):
    """A causal language model of code."""

    task: Literal["code_lm"] = Field(default="code_lm", description="what is trained")
    data: LanguageDataSection = Field(description="documents")
    student: LanguageStudentSection = Field(
        default=LanguageStudentSection(), description="the small language model"
    )
    teacher: LanguageTeacherSection = Field(
        default=LanguageTeacherSection(), description="the large language model"
    )
    method: tuple[MethodOptions, ...] = METHOD
    training: LanguageTraining = Field(
        default=LanguageTraining(), description="steps, optimizer, and how often to evaluate"
    )
    output: Text = OUTPUT
    seed: Whole = SEED

    @property
    def temperature(self) -> float:
        """Of the one method that cross-terms are stored for."""
        return next((getattr(one, "temperature") for one in self.method if hasattr(one, "temperature")), 1.0)  # noqa: B009

    @model_validator(mode="after")
    def _signal_serves_the_methods(self) -> Self:
        section = self.teacher
        learning = [one for one in self.method if hasattr(one, "divergence")]
        if section.keeps_top_k and section.tail == "renormalize":
            for one in learning:
                if _divergence(one) == "reverse_kl":
                    raise KdtrainError(
                        "method.divergence reverse_kl is infinite where teacher.tail renormalize gives the entries that are not "
                        "stored the probability 0; set teacher.tail: bucket"
                    )
        if section.signal == "cross_term":
            for one in learning:
                if _divergence(one) != "forward_kl":
                    raise KdtrainError(
                        f"teacher.signal cross_term serves forward_kl only, got method.divergence {_divergence(one)}; "
                        "set teacher.signal: hidden"
                    )
                if getattr(one, "last_temperature", None) not in (None, getattr(one, "temperature", None)):
                    raise KdtrainError(
                        "teacher.signal cross_term is stored for one temperature, but method.last_temperature changes it; set "
                        "teacher.signal: hidden"
                    )
        return self


def _divergence(options: Any) -> str:
    choice = options.divergence
    return choice if isinstance(choice, str) else str(choice.get("name"))
