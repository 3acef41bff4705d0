"""Student and teacher: built or loaded, always plain transformers sequence classifiers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kdtrain.bigru import BiGRUForSequenceClassification
from kdtrain.bigru_config import BiGRUConfig
from kdtrain.errors import KdtrainError
from kdtrain.recipe import StudentRecipe

LONGEST_DEFAULT = 512


@dataclass(frozen=True)
class Shape:
    """What a method must know of a model before it runs. Hidden states are numbered 0 (embeddings) to `layers`."""

    layers: int
    width: int
    """width of a sentence state"""


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier in eval mode with its own tokenizer."""

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @property
    def classes(self) -> int:
        """C, the width of its logits."""
        return int(self.model.config.num_labels or 0)

    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all weights, whatever file they came from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def tokenizer_hash(self) -> str:
        """SHA-256 over the tokenizer's rules and vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{type(self.tokenizer).__name__} {rules}".encode()).hexdigest()[:32]


def roberta_config(recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase) -> RobertaConfig:
    """The RoBERTa shape that a student section describes, without classes."""
    return RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_length + 2,  # RoBERTa counts positions from pad_token_id + 1
        type_vocab_size=1,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.attention_dropout,
        layer_norm_eps=1e-5,
        **special_ids(tokenizer),
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids that a configuration repeats from its tokenizer."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}


def build_student(
    recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase, classes: tuple[str, ...]
) -> PreTrainedModel:
    """A new student with random weights, or the one at `recipe.path` with a head for `classes`."""
    names: dict[str, Any] = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }
    if recipe.path is not None:
        model = load_classifier(recipe.path, "student.path", ignore_mismatched_sizes=True, **names)
        if model.get_input_embeddings().num_embeddings < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer))
        return model
    if recipe.architecture == "roberta":
        config = roberta_config(recipe, tokenizer)
        config.update(names)
        return RobertaForSequenceClassification(config)
    return BiGRUForSequenceClassification(
        BiGRUConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            max_position_embeddings=recipe.max_length,
            hidden_dropout_prob=recipe.dropout,
            **special_ids(tokenizer),
            **names,
        )
    )


def load_teacher(path: str, classes: tuple[str, ...], max_length: int | None = None) -> Teacher:
    """Load a frozen teacher in float32 and check that its classes are the task's.

    Raises:
        KdtrainError: it cannot be loaded, has no trained head, or other classes or another order of them.
    """
    model, missing = load_classifier(path, "teacher.path", output_loading_info=True)
    if missing["missing_keys"]:
        raise KdtrainError(
            f"the teacher {path} has no trained weights for {', '.join(sorted(missing['missing_keys']))}; "
            "train it on the task first (kdtrain train with method ft and student.path)"
        )
    if model.config.num_labels != len(classes):
        raise KdtrainError(
            f"the teacher {path} has {model.config.num_labels} classes, the data set {len(classes)}"
        )
    named = [str(model.config.id2label[i]) for i in range(len(classes))]
    if named != list(classes) and not all(name == f"LABEL_{i}" for i, name in enumerate(named)):
        i = next(i for i, (a, b) in enumerate(zip(named, classes, strict=True)) if a != b)
        raise KdtrainError(f"class {i} of the teacher {path} is {named[i]!r}, of the data set {classes[i]!r}")
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(path, "teacher.path")
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    if model.config.model_type in ("roberta", "camembert", "xlm-roberta"):
        longest = min(tokenizer.model_max_length, model.config.max_position_embeddings - 2)
    if max_length is not None and max_length > longest:
        raise KdtrainError(
            f"teacher.max_length is {max_length}, but the teacher {path} reads at most {longest} tokens"
        )
    return Teacher(path, model, tokenizer, max_length or min(longest, LONGEST_DEFAULT))


def load_classifier(path: str, field: str, **options: Any) -> Any:
    """Load a sequence classifier by folder or hub id; `field` is the recipe key that is blamed."""
    with _blaming(path, field, "model"):
        # float32 whatever the file holds: small files may be stored in half precision, sums of logits should not be.
        return AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
        )


def load_tokenizer(path: str, field: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub id; `field` is the recipe key that is blamed."""
    with _blaming(path, field, "tokenizer"):
        return AutoTokenizer.from_pretrained(path)


def load_config(path: str, field: str) -> PreTrainedConfig:
    """Load a model's configuration; `field` is the recipe key that is blamed."""
    with _blaming(path, field, "model configuration"):
        return AutoConfig.from_pretrained(path)


def shape_of(config: PreTrainedConfig) -> Shape:
    """Layers and width of the model that a configuration describes."""
    width = config.hidden_size * (2 if isinstance(config, BiGRUConfig) else 1)
    return Shape(int(config.num_hidden_layers), width)


def sentence_states(output: Any, layers: tuple[int, ...]) -> Tensor:
    """The sentence state of each named layer, (B, L, D): the first token's, or the BiGRU's joined ends."""
    if getattr(output, "sentence_states", None) is not None:
        return output.sentence_states[:, [layer - 1 for layer in layers]]
    return torch.stack([output.hidden_states[layer][:, 0] for layer in layers], dim=1)


def parameter_count(model: nn.Module) -> int:
    """All weights, embeddings included."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _blaming(path: str, field: str, what: str) -> Iterator[None]:
    """Turn what transformers raises while it loads into one sentence."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise KdtrainError(f"{field}: there is no folder {path}")
    try:
        with quiet():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise KdtrainError(f"{field}: no {what} could be loaded from {path}: {reason}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and remarks of transformers off the screen; a head that starts anew is what was asked for."""
    shown, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()
