"""Methods that use one hook each, and a run of any of them: `python -m tests.language.frame_methods FOLDER NAME`.

Combined gradients are those of mokd, sampled batches those of gkd and distillm. Made here are rows selected before the teacher
runs, and weights by a statistic of the whole batch.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdtrain.engine.accelerator import start_accelerator
from kdtrain.engine.full_state import whole_state
from kdtrain.evaluation.rows import measured_rows
from kdtrain.loop import train
from kdtrain.methods import method_options
from kdtrain.methods.base import Method, Needs, Step
from kdtrain.methods.distillm import SkewedDistillation
from kdtrain.methods.gkd import GeneralizedDistillation
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.mokd import MultiObjective
from kdtrain.methods.speculative_kd import SpeculativeDistillation
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.models.loading import Shape
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED, Batch, HeadOutputs, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe import LanguageDataSection, LanguageRecipe, LanguageTraining
from kdtrain.tasks.code_lm.metrics import language_metrics
from kdtrain.tasks.code_lm.outputs import LanguageModels
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.task import shape_of
from tests.language.conftest import tiny


class Hardest(LogitDistillation):
    """Only the half of the rows that the student predicts worst; counts what it was told."""

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        self.register_buffer("told", torch.zeros(2, dtype=torch.float64))

    def score(self, step: Step, batch: Batch, student: Outputs) -> Tensor:
        """Mean cross entropy of a row."""
        losses = student.statistics().ce
        return losses.sum(1) / (batch.labels != IGNORED).sum(1)

    def select(self, step: Step, rows: Tensor, scores: Tensor) -> Tensor:
        """The worse half, in order of the rows."""
        kept = scores.topk((len(rows) + 1) // 2).indices.sort().values
        return rows[kept]

    def after_step(self, step: Step, values: Mapping[str, Tensor]) -> None:
        """Add up the loss."""
        assert isinstance(self.told, Tensor)
        self.told[0] += values["loss"]

    def after_evaluate(self, step: Step, metrics: Mapping[str, float]) -> None:
        """Keep the last held-out loss."""
        assert isinstance(self.told, Tensor)
        self.told[1] = metrics["loss"]


class Uncertain(LogitDistillation):
    """Weighs the tokens about which the teacher is less sure than the median token of the whole batch three times."""

    def needs(self) -> Needs:
        """The statistic of all tokens."""
        return Needs(whole_batch=True)

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """Of the counted tokens."""
        entropy = student.statistics(teachers["teacher"]).teacher_entropy
        return {"entropy": entropy[batch.labels != IGNORED]}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """Those of kd with weights."""
        assert isinstance(student, HeadOutputs)
        entropy = student.statistics(teachers["teacher"]).teacher_entropy
        weight = torch.where(entropy > batch.whole["entropy"].values.median(), 3.0, 1.0)
        return {
            "kd": student.divergence(teachers["teacher"], self.divergence, weight=weight),
            "ce": student.cross_entropy(weight=weight),
        }


KINDS: dict[str, type[Method]] = {
    "plain": LogitDistillation,
    "mokd": MultiObjective,
    "hardest": Hardest,
    "gkd": GeneralizedDistillation,
    "distillm": SkewedDistillation,
    "speculative_kd": SpeculativeDistillation,
    "uncertain": Uncertain,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mokd": {"kd_weight": 0.7, "temperature": 1.5, "feature_weight": 0.5},
    "gkd": {"student_share": 0.7, "max_new_tokens": 4, "prompt_tokens": 2},
    "distillm": {"first_threshold": 1.0, "replay_capacity": 6, "replay_width": 16, "max_new_tokens": 4, "prompt_tokens": 2},
    "speculative_kd": {"top_k": 60, "block_tokens": 3, "max_new_tokens": 4, "prompt_tokens": 2},
}  # fmt: skip


def objective_of(name: str) -> Objective:
    """A llama student of width 32, a qwen2 teacher of width 48, and the method of this name."""
    student, teacher = tiny("llama"), tiny("qwen2", 1, hidden_size=48).requires_grad_(False)
    options: Any = LogitDistillation.Options(kd_weight=0.7, ce_weight=0.4, temperature=1.5)
    if name in OPTIONS:
        options = KINDS[name].Options(**OPTIONS[name])
    method = KINDS[name](options, shape_of(student), {"teacher": shape_of(teacher)})
    models = LanguageModels(LanguageTeacher("teacher", teacher, None))  # type: ignore[arg-type]
    return Objective(student, [method], models)


def recipe_of(
    *,
    max_steps: int,
    batch_size: int,
    eval_steps: int,
    accumulation: int = 1,
    save_steps: int | None = None,
) -> LanguageRecipe:
    """A recipe of which the loop reads the training section alone."""
    training = LanguageTraining(
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=1e-2,
        eval_steps=eval_steps,
        logging_steps=1,
        gradient_accumulation_steps=accumulation,
        save_steps=save_steps,
    )
    return LanguageRecipe(
        data=LanguageDataSection(train="-"), method=(method_options("ft"),), training=training
    )


def steps(
    folder: Path, name: str, data: PackedRows, *, accumulation: int = 1, save_steps: int | None = None
) -> dict[str, Tensor]:
    """Three optimizer steps in `folder`, in as many processes as there are; the state of the objective."""
    recipe = recipe_of(
        max_steps=3, batch_size=5, eval_steps=3, accumulation=accumulation, save_steps=save_steps
    )
    return train_in(folder, objective_of(name), data, recipe)


def train_in(
    folder: Path, objective: Objective, data: PackedRows, recipe: LanguageRecipe
) -> dict[str, Tensor]:
    """Train a language model in `folder`, measured on the rows that it learns; the state of the objective."""
    accelerator = start_accelerator(recipe.training, sharded=True)
    assert isinstance(objective.models, LanguageModels) and objective.models.teacher is not None
    objective.models.teacher.place(accelerator)

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        sums = measured_rows(
            lambda batch: model(run=lambda: objective.measure(batch)), data, accelerator, tokens=64
        )
        return language_metrics(sums, teacher=True)

    folder.mkdir(parents=True, exist_ok=True)
    train(recipe, objective, data, evaluate, folder, accelerator)
    return whole_state(objective)


if __name__ == "__main__":
    from tests.language.test_objective import rows

    place = Path(sys.argv[1])
    found = steps(place, sys.argv[2], rows(packing=False))
    if os.environ["RANK"] == "0":
        save_file({name: value.contiguous() for name, value in found.items()}, place / "state.safetensors")
