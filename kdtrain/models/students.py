"""Students, built or loaded: always classifiers that transformers loads, of one text or of two."""

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)

from kdtrain.errors import KdtrainError
from kdtrain.models.bigru_config import BiGRUConfig
from kdtrain.models.loading import load_classifier, load_config, load_model, positions_of, special_ids
from kdtrain.models.pair_checkpoint import holds_a_pair_head, load_pair_checkpoint
from kdtrain.models.pair_config import PairConfig
from kdtrain.models.pairs import WITH_POOLER, PairForSequenceClassification
from kdtrain.recipe import StudentSection


def roberta_config(recipe: StudentSection, tokenizer: PreTrainedTokenizerBase) -> RobertaConfig:
    """The RoBERTa shape that a student section describes, without classes."""
    if tokenizer.pad_token_id is None:
        raise KdtrainError(
            f"student.tokenizer: {recipe.tokenizer} has no padding token, from which RoBERTa counts positions; set its pad_token"
        )
    return RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        # RoBERTa counts positions from pad_token_id + 1.
        max_position_embeddings=recipe.max_length + int(tokenizer.pad_token_id) + 1,  # type: ignore[arg-type]
        type_vocab_size=1,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.attention_dropout,
        layer_norm_eps=1e-5,
        **special_ids(tokenizer),
    )


def bigru_config(recipe: StudentSection, tokenizer: PreTrainedTokenizerBase) -> BiGRUConfig:
    """The BiGRU shape that a student section describes, without classes."""
    return BiGRUConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        max_position_embeddings=recipe.max_length,
        hidden_dropout_prob=recipe.dropout,
        **special_ids(tokenizer),
    )


def build_student(
    recipe: StudentSection,
    tokenizer: PreTrainedTokenizerBase,
    classes: tuple[str, ...],
    *,
    pairs: bool = False,
) -> PreTrainedModel:
    """A new student with random weights, or the one at `recipe.path` with a head for `classes`; of pairs if asked.

    Raises:
        KdtrainError: nothing that fits at `recipe.path`, or `recipe.max_length` tokens are more than it can read.
    """
    names: dict[str, Any] = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }
    if recipe.path is not None:
        load = _load_pairs if pairs else _load_single
        model = load(recipe, recipe.path, tokenizer, names)
        check_positions(model.config, recipe)
        return model
    if recipe.architecture == "roberta":
        config: PreTrainedConfig = roberta_config(recipe, tokenizer)
    else:
        config = bigru_config(recipe, tokenizer)
    if pairs:
        return _pair_model(config, recipe.dropout, {**special_ids(tokenizer), **names})
    config.update(names)
    return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def check_positions(config: PreTrainedConfig, recipe: StudentSection) -> None:
    """Refuse rows longer than the student has positions for."""
    positions = positions_of(config)
    if positions is not None and recipe.max_length > positions:
        raise KdtrainError(
            f"student.max_length is {recipe.max_length}, but {recipe.path} reads at most {positions} tokens"
        )


def _load_single(
    recipe: StudentSection, path: str, tokenizer: PreTrainedTokenizerBase, names: dict[str, Any]
) -> PreTrainedModel:
    if isinstance(load_config(path, "student.path"), PairConfig):
        raise KdtrainError(
            f"student.path: {path} classifies pairs of texts, and the rows of this task are single texts"
        )
    model = load_classifier(path, "student.path", new_head=True, **names)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return model


def _load_pairs(
    recipe: StudentSection, path: str, tokenizer: PreTrainedTokenizerBase, names: dict[str, Any]
) -> PreTrainedModel:
    """A classifier of pairs with its head, or a new head over the encoder of any other model."""
    config = load_config(path, "student.path")
    if isinstance(config, PairConfig):
        model = load_classifier(path, "student.path", new_head=True, **names)
    elif holds_a_pair_head(path, int(getattr(config, "hidden_size", 0))):
        model = load_pair_checkpoint(path, config, "student.path", names)
    else:
        # The encoder's own, as in heads over single texts.
        dropout = getattr(config, "hidden_dropout_prob", recipe.dropout)
        model = _pair_model(config, dropout, {**special_ids(tokenizer), **names})
        options: dict[str, Any] = {"add_pooling_layer": False} if config.model_type in WITH_POOLER else {}
        encoder = load_model(AutoModel, path, "student.path", new_head=True, what="encoder", **options)
        model.encoder.load_state_dict(encoder.state_dict())
    known = int(model.config.encoder_config.vocab_size)
    if known < len(tokenizer):
        raise KdtrainError(
            f"student.path: {path} knows {known} tokens, and the tokenizer has {len(tokenizer)}; take the tokenizer that "
            "belongs to it (leave student.tokenizer out)"
        )
    return model


def _pair_model(
    config: PreTrainedConfig, dropout: float, more: dict[str, Any]
) -> PairForSequenceClassification:
    shape = {**config.to_dict(), "model_type": config.model_type}
    return PairForSequenceClassification(PairConfig(encoder=shape, classifier_dropout=dropout, **more))
