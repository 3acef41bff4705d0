"""On-policy methods from a recipe: a whole run, and a teacher that cannot read what the student writes."""

from pathlib import Path

import pytest

from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.methods import method_options
from kdtrain.recipe import LanguageRecipe, LanguageTeacherSection
from kdtrain.run import run
from tests.language.conftest import opened

GKD = (method_options("gkd", student_share=1.0, max_new_tokens=6, prompt_tokens=4),)


def test_a_recipe_learns_from_what_the_student_writes(
    language_distillation: LanguageRecipe, tmp_path: Path
) -> None:
    recipe = language_distillation.replaced(method=GKD, output=str(tmp_path / "run"))
    summary = run(recipe)
    lines = read_metrics(tmp_path / "run")
    assert [line["sampled_steps"] for line in lines if "sampled_steps" in line] == [1.0] * 6
    measured = [line["valid/divergence"] for line in lines if "valid/divergence" in line]
    assert measured[-1] < measured[0]
    assert summary.method == "gkd"
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_stored_outputs_are_refused(language_distillation: LanguageRecipe, language_teacher: Path) -> None:
    teacher = LanguageTeacherSection(path=str(language_teacher), signal="topk")
    with pytest.raises(
        KdtrainError,
        match=r"method gkd reads the teacher on rows .* does not store; set teacher.signal: online",
    ):
        opened(language_distillation.replaced(method=GKD, teacher=teacher))
