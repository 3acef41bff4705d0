"""Recipes that cannot work are refused before training, with the field and the fix."""

from typing import Any

import pytest

from kdtrain.errors import KdtrainError
from kdtrain.methods import METHODS, build_methods
from kdtrain.models.loading import Shape
from kdtrain.objective import Objective
from kdtrain.tasks.code_lm.outputs import LanguageModels
from tests.language.conftest import tiny

STUDENT, TEACHER = Shape(2, 32), Shape(4, 48)
CASES: list[tuple[str, str, list[dict[str, Any]], str]] = [
    ("another task", "code_lm", [{"name": "rkd"}], r"method rkd is for task classification, got task: code_lm; choose another method.name"),
    ("another task", "classification", [{"name": "gkd"}], r"method gkd is for task code_lm, got task: classification"),
    ("a second teacher", "classification", [{"name": "dynamic_teachers"}], r"method dynamic_teachers needs a teacher; set small.path"),
    ("a layer", "code_lm", [{"name": "kd_features", "layer_map": [[3, 1]]}], r"method.layer_map holds \[3, 1\], but the student has layers 1 to 2"),
    ("a layer", "code_lm", [{"name": "mokd", "feature_weight": 1.0, "layer_map": [[1, 5]]}], r"method.layer_map holds \[1, 5\], but the teacher has layers 1 to 4"),
    ("no weight", "code_lm", [{"name": "kd", "kd_weight": 0.0, "ce_weight": 0.0}], r"every weight of method kd is 0 in every step, .* set method.kd_weight or method.ce_weight above 0"),
    ("no weight", "code_lm", [{"name": "routed", "teacher_weights": {"teacher": 0.0}}], r"method.teacher_weights must have a sum above 0"),
    ("two samplers", "code_lm", [{"name": "gkd"}, {"name": "distillm"}], r"the methods gkd and distillm both make batches, and only one may; leave one of them out"),
    ("two selections", "classification", [{"name": "dynamic_selection"}] * 2, r"both select rows, and only one may"),
    ("combined gradients", "code_lm", [{"name": "mokd"}, {"name": "kd"}], r"method mokd combines the gradients of its own terms .* leave kd out"),
    ("a sampler without an end", "code_lm", [{"name": "speculative_kd"}], r"no end-of-text token to stop sampling at; set eos_token_id in the config.json of student.path"),
    ("long prompts", "code_lm", [{"name": "gkd", "prompt_tokens": 128}], r"method.prompt_tokens is 128, and the student reads at most 128 tokens, .* set method.prompt_tokens to 127 or less"),
    ("a range", "code_lm", [{"name": "gkd", "student_share": 1.5}], r"method.student_share must be 1 or less, got 1.5"),
    ("an unknown field", "code_lm", [{"name": "distillm", "replay_size": 5}], r"unknown recipe key method.replay_size; did you mean method.replay"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "task", "methods", "sentence"), CASES)
def test_refused(case: str, task: str, methods: list[dict[str, Any]], sentence: str) -> None:
    student = tiny("llama")
    if case == "a sampler without an end":
        student.config.eos_token_id = None
    with pytest.raises(KdtrainError, match=sentence):
        options = [METHODS[one["name"]].Options.parse(one, "method.") for one in methods]
        Objective(student, build_methods(options, task, STUDENT, {"teacher": TEACHER}), LanguageModels())
