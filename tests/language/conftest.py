"""Tiny language models of every family, a tokenizer and documents, all made here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from kdtrain.methods import build_methods, method_options
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.objective import Objective
from kdtrain.recipe import (
    LanguageDataSection,
    LanguageRecipe,
    LanguageStudentSection,
    LanguageTeacherSection,
    LanguageTraining,
    MethodOptions,
)
from kdtrain.run import run
from kdtrain.tasks.code_lm.outputs import LanguageModels
from kdtrain.tasks.code_lm.task import CodeLM, checked_objective, shape_of

VOCABULARY = 300
FEATURES = (
    method_options("kd_features", temperature=1.0, ce_weight=0.5, layer_map=((2, 2),)),
    method_options("relations", relations=("attention", "values")),
)
"""The distribution of the last layer, its states, and its attention."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama_tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=3.0, sliding_window=64),
    "starcoder2": lambda: Starcoder2Config(**SHAPE),
    "deepseek": lambda: DeepseekV2Config(**SHAPE, **DEEPSEEK),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.25),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of two layers and width 32 in eval mode, its weights large enough for logits that differ."""
    config = FAMILIES[family]()
    config.update(changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Small Python functions of very different lengths."""
    return [
        f"def add_{i}(a, b):\n" + "".join(f"    a = a + {j} * b\n" for j in range(i % 7)) + "    return a\n"
        for i in range(60)
    ]


@pytest.fixture(scope="session")
def tokenizer(sources: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens without automatic special tokens."""
    made = train_tokenizer(sources, vocab_size=VOCABULARY, max_length=1 << 20)
    made.backend_tokenizer.post_processor = None
    return made


@pytest.fixture(scope="session")
def language_recipe(
    tmp_path_factory: pytest.TempPathFactory, sources: list[str], tokenizer: PreTrainedTokenizerFast
) -> LanguageRecipe:
    """A run of a second or two on labels only, with a new student and its own tokenizer; tests replace its parts."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": source}) + "\n" for source in sources))
    tokenizer.save_pretrained(folder / "tokenizer")
    return LanguageRecipe(
        data=LanguageDataSection(train=str(folder / "code.jsonl"), max_length=64, held_out=0.2),
        student=LanguageStudentSection(
            tokenizer=str(folder / "tokenizer"), hidden_size=32, layers=2, heads=2, intermediate_size=64
        ),
        method=(method_options("ft"),),
        training=LanguageTraining(
            max_steps=24, batch_size=7, learning_rate=1e-2, eval_steps=8, logging_steps=4
        ),
    )


@pytest.fixture(scope="session")
def language_teacher(language_recipe: LanguageRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of that run, which serves as a teacher."""
    folder = tmp_path_factory.mktemp("language_teacher")
    run(language_recipe.replaced(output=str(folder / "run")))
    return folder / "run" / "student"


@pytest.fixture(scope="session")
def language_distillation(language_recipe: LanguageRecipe, language_teacher: Path) -> LanguageRecipe:
    """Distillation of distribution, hidden states and attention into a narrower student with the teacher's tokenizer."""
    return language_recipe.replaced(
        student=language_recipe.student.replaced(tokenizer=None, hidden_size=16),
        teacher=LanguageTeacherSection(path=str(language_teacher)),
        method=FEATURES,
    )


def opened(recipe: LanguageRecipe) -> CodeLM:
    """A run with everything opened and checked, and nothing written."""
    run = CodeLM(recipe)
    run.identity()
    return run


def objective_of(
    student: PreTrainedModel,
    methods: MethodOptions | Sequence[MethodOptions],
    teacher: PreTrainedModel | None,
    stored: LanguageTeacherSection | None = None,
) -> Objective:
    """A student and the methods of a recipe, with a frozen teacher."""
    methods = (methods,) if isinstance(methods, MethodOptions) else tuple(methods)
    warm: list[Any] = [one for one in methods if hasattr(one, "temperature")]
    known = None
    if teacher is not None:
        known = LanguageTeacher("teacher", teacher.eval().requires_grad_(False), None)  # type: ignore[arg-type]
    shapes = {} if teacher is None else {"teacher": shape_of(teacher)}
    tail = "bucket" if stored is None else stored.tail
    temperature = warm[0].temperature if warm else 1.0
    models = LanguageModels(known, tail=tail, temperature=temperature)
    return checked_objective(student, build_methods(methods, CodeLM.name, shape_of(student), shapes), models)
