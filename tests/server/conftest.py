"""The tiny recipe, teacher and documents of the language tests, and a server of that teacher."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.methods import method_options
from kdtrain.recipe import LanguageRecipe
from tests.language.conftest import (
    language_distillation,
    language_recipe,
    language_teacher,
    sources,
)
from tests.language.conftest import tokenizer as tokenizer
from tests.support.model_server import ServedTeacher, serving

__all__ = ["language_distillation", "language_recipe", "language_teacher", "sources"]  # found here by pytest

Start = Callable[..., tuple[ServedTeacher, str]]


@pytest.fixture
def start(language_teacher: Path) -> Iterator[Start]:
    """Start a server of the teacher; options are those of `ServedTeacher`."""
    model = AutoModelForCausalLM.from_pretrained(language_teacher).eval()
    words = AutoTokenizer.from_pretrained(language_teacher)
    with ExitStack() as stack:

        def begin(port: int = 0, **options: Any) -> tuple[ServedTeacher, str]:
            teacher = ServedTeacher(options.pop("model", model), options.pop("words", words), **options)
            return teacher, stack.enter_context(serving(teacher, port))

        yield begin


@pytest.fixture(scope="session")
def distillation(language_distillation: LanguageRecipe) -> LanguageRecipe:
    """Ten steps with one segment in a forward pass, as servers answer piece by piece."""
    return language_distillation.replaced(
        teacher=language_distillation.teacher.replaced(batch_tokens=1),
        method=method_options("kd", temperature=2.0, ce_weight=0.5),
        training=language_distillation.training.replaced(max_steps=10, eval_steps=10, logging_steps=1),
    )


def served(recipe: LanguageRecipe, output: Path, url: str | None, **options: Any) -> LanguageRecipe:
    """The recipe with a teacher on servers."""
    teacher = recipe.teacher.replaced(source="server", url=url, **options)
    return recipe.replaced(teacher=teacher, output=str(output))
