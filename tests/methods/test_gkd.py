"""GKD (arXiv 2306.13649): which steps sample, and the divergence on what was sampled in float64."""

import pytest
import torch

from kdtrain.methods.base import Step
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED
from kdtrain.tasks.code_lm.outputs import LanguageModels
from tests.language.conftest import tiny
from tests.methods.test_sampling import STEP, batch_of
from tests.methods.test_speculative_kd import Here, built


def test_a_share_of_the_steps_samples_2306_13649() -> None:
    method = built("gkd", student_share=0.3)
    chosen = [method.samples(Step(number, 2000, seed=5)) for number in range(2000)]  # type: ignore[operator]
    assert sum(chosen) / 2000 == pytest.approx(0.3, abs=0.04)
    assert chosen[:100] != [method.samples(Step(number, 2000, seed=6)) for number in range(100)]  # type: ignore[operator]


def test_nothing_is_sampled_off_policy() -> None:
    method, batch = built("gkd", student_share=0.0), batch_of()
    assert method.make_batch(STEP, batch, Here(None, None)) is batch
    assert float(method.logged()["sampled_steps"]) == 0.0


def test_the_divergence_of_the_students_own_tokens_2306_13649() -> None:
    """Generalised JSD with beta 0.1, T = 1, summed over the tokens of the continuations."""
    student, teacher = tiny("llama"), tiny("qwen2", 1, hidden_size=48).requires_grad_(False)
    method = built("gkd", student_share=1.0, divergence={"name": "jsd", "beta": 0.1})
    batch = method.make_batch(STEP, batch_of(packing=True), Here(student, teacher))
    models = LanguageModels(LanguageTeacher("teacher", teacher, None))  # type: ignore[arg-type]
    loss, _ = Objective(student, [method], models)(batch, 1)
    with torch.no_grad():
        p, q = (model(input_ids=batch.input_ids).logits.double().softmax(-1) for model in (teacher, student))
    mixture = 0.1 * p + 0.9 * q
    divergence = 0.1 * (p * (p / mixture).log()).sum(-1) + 0.9 * (q * (q / mixture).log()).sum(-1)
    expected = divergence[batch.labels != IGNORED].sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
