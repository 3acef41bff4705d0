"""Student language models: started from a checkpoint, or new in the shape that the recipe gives."""

import tempfile
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from kdtrain.errors import KdtrainError
from kdtrain.models.heads import head_of
from kdtrain.models.language_teacher import LanguageTeacher, load_causal
from kdtrain.models.loading import load_config, load_tokenizer, special_ids
from kdtrain.models.lora import add_adapters
from kdtrain.recipe import LanguageRecipe

FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}

SAMPLE_CODE = ("def f(x):\n    return x + 1\n", "class A:\n\tpass", "# naïve café 你好\n", "a  b\n\n\n  c")
"""Texts that tokenizers must cut alike."""


def student_tokenizer(recipe: LanguageRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, by default the student's own, else the teacher's."""
    given = recipe.student.tokenizer or recipe.student.path or recipe.teacher.path
    if given is None:
        raise KdtrainError(
            "a new student needs a tokenizer; set student.tokenizer to a folder or hub id, or name a teacher"
        )
    fields = (
        (recipe.student.tokenizer, "student.tokenizer"),
        (recipe.student.path, "student.path"),
        (recipe.teacher.path, "teacher.path"),
    )
    return load_tokenizer(given, next(field for value, field in fields if value is not None))


def build_language_student(
    recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerBase, teacher: LanguageTeacher | None
) -> PreTrainedModel:
    """A student in float32: new, with as many rows in its head as the teacher that shares its tokenizer, or loaded."""
    given = recipe.student
    if given.path is not None:
        model = load_causal(given.path, "student.path")
        rows = model.config.get_text_config().vocab_size
        if rows < len(tokenizer):
            raise KdtrainError(
                f"student.path {given.path} has {rows} rows in its head, the tokenizer {len(tokenizer)} tokens; give the "
                "student its own tokenizer"
            )
    else:
        rows = len(tokenizer)
        if teacher is not None and given.tokenizer is None:
            rows = max(rows, teacher.head.weight.shape[0])
        model = AutoModelForCausalLM.from_config(
            new_config(recipe, rows, special_ids(tokenizer)), dtype=torch.float32, trust_remote_code=False
        )
    check_length(model, "student", recipe.data.max_length)
    if given.lora_rank:
        torch.manual_seed(recipe.seed)  # loading draws random numbers too, not always as many
        add_adapters(model, given)
    if given.frozen_head:
        head = head_of(model)
        head.weight.requires_grad_(False)
        if head.bias is not None:
            head.bias.requires_grad_(False)
    return model


def check_length(model: PreTrainedModel, side: str, max_length: int) -> None:
    """Refuse rows that are longer than a model reads."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise KdtrainError(
            f"data.max_length is {max_length}, but the {side} reads at most {longest} tokens; lower it to {longest}"
        )


def new_config(recipe: LanguageRecipe, rows: int, special: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a new student with `rows` rows in its head."""
    given = recipe.student
    return FAMILIES[given.architecture](
        vocab_size=rows,
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        head_dim=given.hidden_size // given.heads,
        max_position_embeddings=recipe.data.max_length,
        tie_word_embeddings=given.tie_embeddings,
        **special,
    )


def student_config(recipe: LanguageRecipe) -> PreTrainedConfig:
    """The configuration of the recipe's student, without building it."""
    if recipe.student.path is not None:
        return load_config(recipe.student.path, "student.path")
    if (
        recipe.student.tokenizer is None
        and recipe.teacher.path is not None
        and recipe.teacher.signal != "shards"
    ):
        return new_config(
            recipe, load_config(recipe.teacher.path, "teacher.path").get_text_config().vocab_size, {}
        )
    return new_config(recipe, len(student_tokenizer(recipe)), {})


def check_tokenizer_survives(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save and load the tokenizer beside the student's configuration, as its users will find it.

    For some families transformers builds the family's own rules around the stored vocabulary, whatever was saved.

    Raises:
        KdtrainError: the loaded tokenizer cuts text otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        student.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = load_tokenizer(folder, "student.tokenizer")
    for text in SAMPLE_CODE:
        if loaded(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise KdtrainError(
                f"a student of the family {student.config.model_type} would be loaded with a {type(loaded).__name__}, which cuts "
                f"{text[:20]!r} otherwise than the tokenizer of this run; choose another student.architecture or a "
                "tokenizer made for this family"
            )
