"""A run of the loop with each method learns: classifiers get above chance, language models nearer to data and teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdtrain.engine.accelerator import start_accelerator
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.loop import train
from kdtrain.methods import METHODS, build_methods
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.models.loading import shape_of
from kdtrain.objective import Objective, teacher_layers
from kdtrain.outputs import Batch
from kdtrain.tasks.code_lm.outputs import LanguageModels
from kdtrain.tasks.code_lm.task import shape_of as language_shape
from tests.language.conftest import tiny
from tests.language.frame_methods import recipe_of, train_in
from tests.language.test_objective import rows
from tests.train.test_objective import CLASSES, CLASSIFIED, TEACHER, model_of, teacher_width

ROWS = 60
SHORT = {"max_new_tokens": 4, "prompt_tokens": 2}
LANGUAGE: dict[str, dict[str, Any]] = {
    "gkd": SHORT,
    "distillm": {**SHORT, "first_threshold": 0.6, "replay_capacity": 20, "replay_width": 16},
    "speculative_kd": {**SHORT, "top_k": 50, "block_tokens": 2},
    "mokd": {"feature_weight": 1.0},
    "routed": {"teacher_weights": {"teacher": 1.0}},
}
LANGUAGE_METHODS = [name for name, kind in METHODS.items() if "code_lm" in kind.tasks]


class Classified:
    """Texts of ten tokens whose third tells the class, and a teacher that knows it."""

    def __init__(self, model: Objective) -> None:
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.arange(ROWS) % CLASSES
        self.ids = torch.randint(20, 50, (ROWS, 10), generator=generator)
        self.ids[:, 2] = 5 + self.labels
        layers = teacher_layers(model.plan, "teacher")
        width = teacher_width(model.plan[0].options.name, shape_of(model.student.config))  # type: ignore[arg-type]
        of_class = torch.randn(CLASSES, TEACHER.layers + 1, 10, width, generator=generator)
        states = of_class[self.labels] + 0.1 * torch.randn(ROWS, *of_class.shape[1:], generator=generator)
        self.outputs = {"logits": 4.0 * torch.eye(CLASSES)[self.labels]}
        if layers.tokens:
            self.outputs["states"] = states[:, list(layers.all_states)]
            self.outputs["mask"] = torch.ones(ROWS, 10, dtype=torch.bool)
        elif layers.states:
            self.outputs["states"] = states[:, list(layers.all_states), 0]

    @property
    def lengths(self) -> Tensor:
        """Ten tokens each."""
        return torch.full((ROWS,), 10)

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows."""
        outputs = {name: value[index] for name, value in self.outputs.items()}
        return Batch(
            self.ids[index],
            self.labels[index],
            index,
            attention_mask=torch.ones(len(index), 10, dtype=torch.int64),
            stored={"teacher": outputs, "small": outputs} if stored else {},
        )

    def count(self, index: Tensor) -> int:
        """Rows."""
        return len(index)


@pytest.mark.parametrize("name", CLASSIFIED)
def test_a_classifier_learns(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    data = Classified(model)
    everything = data.batch(torch.arange(ROWS), torch.device("cpu"))

    def evaluate(wrapped: nn.Module) -> dict[str, float]:
        wrapped.eval()
        with torch.no_grad():
            logits = model.measure(everything)
        loss = float(nn.functional.cross_entropy(logits, data.labels))
        return {"loss": loss, "accuracy": float((logits.argmax(1) == data.labels).float().mean())}

    recipe = recipe_of(max_steps=48, batch_size=12, eval_steps=16)
    train(recipe, model, data, evaluate, tmp_path, start_accelerator(recipe.training))
    # Weights of the papers (3000 for sp) leave little to the labels of so few steps. Chance is 0.2, with a deviation of 0.05.
    assert evaluate(model)["accuracy"] > 0.4


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
def test_a_language_model_learns(name: str, tmp_path: Path) -> None:
    student = tiny("llama")
    teacher = tiny("qwen2", 1, hidden_size=48).requires_grad_(False)
    options = METHODS[name].Options.parse({"name": name, **LANGUAGE.get(name, {})}, "method.")
    methods = build_methods(
        [options], "code_lm", language_shape(student), {"teacher": language_shape(teacher)}
    )
    models = LanguageModels(LanguageTeacher("teacher", teacher, None))  # type: ignore[arg-type]
    train_in(tmp_path, Objective(student, methods, models), rows(packing=True), recipe_of(max_steps=30, batch_size=3, eval_steps=5))  # fmt: skip
    measured = [line for line in read_metrics(tmp_path) if "valid/loss" in line]
    of_labels = getattr(options, "ce_weight", 1.0) > 0
    metric = "valid/loss" if of_labels else "valid/divergence"
    if name == "relations":  # neither labels nor the distribution of the teacher
        losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
        assert losses[-1] < 0.7 * losses[0]
    else:
        assert measured[-1][metric] < 0.9 * measured[0][metric]
