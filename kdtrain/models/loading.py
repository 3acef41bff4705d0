"""How models and tokenizers are loaded, and what is known of a model before it runs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kdtrain.errors import KdtrainError
from kdtrain.models.bigru_config import BiGRUConfig
from kdtrain.models.pair_config import PairConfig
from kdtrain.models.strict_loading import check_tokenizer, check_tokenizer_files, load_strictly

COUNTS_FROM_PADDING = ("roberta", "camembert", "xlm-roberta")
"""Encoders whose first position is pad_token_id + 1."""


@dataclass(frozen=True)
class Shape:
    """What a method must know of a model before it runs. Hidden states are numbered 0 (embeddings) to `layers`."""

    layers: int
    width: int
    """width of a sentence state"""
    embeddings: bool = True
    """whether layer 0, the embeddings, has that width too (a BiGRU's has half of it)"""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids that a configuration repeats from its tokenizer."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}


def load_model(
    kind: Any,
    path: str,
    field: str,
    *,
    dtype: torch.dtype = torch.float32,
    new_head: bool = False,
    what: str = "model",
    **options: Any,
) -> Any:
    """Load a model of transformers, see `strict_loading.load_strictly`. This is the only way in which kdtrain loads one.

    Args:
        dtype: float32 whatever the file holds: small files may be in half precision, sums of logits should not be.
        what: what the sentence calls it.
    """
    with blaming(path, field, what):
        return load_strictly(kind, path, field, new_head=new_head, dtype=dtype, **options)


def load_classifier(path: str, field: str, *, new_head: bool = False, **options: Any) -> Any:
    """Load a sequence classifier by folder or hub id; `field` is the recipe key that is blamed."""
    return load_model(AutoModelForSequenceClassification, path, field, new_head=new_head, **options)


def load_tokenizer(path: str, field: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub id; `field` is the recipe key that is blamed.

    A folder with nothing but tokenizer.json is read as it stands, with RoBERTa's <s> ... </s> around every text.
    """
    folder = Path(path)
    with blaming(path, field, "tokenizer"):
        check_tokenizer_files(path, field)
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").exists():
            tokenizer: PreTrainedTokenizerBase = _bare_tokenizer(folder / "tokenizer.json")
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer, path, field)
    return tokenizer


def _bare_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    rules = Tokenizer.from_file(str(path))
    first, last = rules.token_to_id("<s>"), rules.token_to_id("</s>")
    if first is None or last is None or rules.token_to_id("<pad>") is None:
        raise ValueError("tokenizer.json alone must hold <s>, <pad> and </s>; add a tokenizer_config.json")
    rules.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    unknown = {"unk_token": "<unk>"} if rules.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", **special, **unknown)


def load_config(path: str, field: str) -> PreTrainedConfig:
    """Load a model's configuration; `field` is the recipe key that is blamed."""
    with blaming(path, field, "model configuration"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def shape_of(config: PreTrainedConfig) -> Shape:
    """Layers and width of the model that a configuration describes."""
    if isinstance(config, PairConfig):
        config = config.encoder_config
    recurrent = isinstance(config, BiGRUConfig)
    return Shape(
        int(config.num_hidden_layers), int(config.hidden_size) * (2 if recurrent else 1), not recurrent
    )


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model of this configuration can read, special ones included; None where nothing limits them."""
    if isinstance(config, PairConfig):
        config = config.encoder_config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in COUNTS_FROM_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def sentence_states(output: Any, layers: tuple[int, ...]) -> Tensor:
    """The sentence state of each named layer, (B, L, D): the first token's, or the BiGRU's joined ends."""
    if getattr(output, "sentence_states", None) is not None:
        return output.sentence_states[:, [layer - 1 for layer in layers]]
    return torch.stack([output.hidden_states[layer][:, 0] for layer in layers], dim=1)


def sequence_states(output: Any, layers: tuple[int, ...]) -> Tensor:
    """The states of every token in each named layer, (B, L, N, D)."""
    return torch.stack([output.hidden_states[layer] for layer in layers], dim=1)


def parameter_count(model: nn.Module) -> int:
    """All weights, embeddings included."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over a tokenizer's rules, vocabulary, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = json.dumps([tokenizer.special_tokens_map, tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(f"{type(tokenizer).__name__} {rules} {special}".encode()).hexdigest()[:32]


@contextmanager
def blaming(path: str, field: str, what: str) -> Iterator[None]:
    """Turn what transformers raises while it loads into one sentence."""
    folder = Path(path).is_dir()
    # The hub's ids are a name, or an owner and a name.
    if not folder and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise KdtrainError(f"{field}: there is no folder {path}")
    try:
        with quiet():
            yield
    except KdtrainError:  # a ValueError that names everything already
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        place = path if folder else f"{path}, which is no folder here"
        raise KdtrainError(f"{field}: no {what} could be loaded from {place}: {reason}") from None
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises a bare one for a damaged tokenizer.json
            raise
        raise KdtrainError(f"{field}: no {what} could be loaded from {path}: {error}") from None


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
