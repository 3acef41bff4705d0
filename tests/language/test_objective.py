"""One loss and one gradient, however a batch is cut, padded or packed; what each part of the objective is; the hooks."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.methods.base import Step
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED, Batch, LogitTerm
from kdtrain.recipe import MethodOptions
from kdtrain.tasks.code_lm.documents import Documents
from kdtrain.tasks.code_lm.packing import PackedRows, pack
from tests.language.conftest import VOCABULARY, objective_of, tiny

CPU = torch.device("cpu")
LENGTHS = [9, 3, 14, 6, 2, 11, 5, 8]
RECIPES = {
    "ft": method_options("ft"),
    "kd": method_options("kd", temperature=2.0, kd_weight=0.7, ce_weight=0.4),
    "skew_kl": method_options("kd", temperature=1.0, divergence="skew_kl", ce_weight=0.2),
    "jsd": method_options("kd", temperature=1.0, divergence={"name": "jsd", "beta": 0.3}, ce_weight=0.0),
    "kd_features": method_options(
        "kd_features", temperature=1.0, layer_map=((1, 2), (2, 2)), feature_weight=0.3, ce_weight=0.4
    ),
}


def rows(*, packing: bool, masked: int = 1) -> PackedRows:
    """Eight documents of different lengths whose first tokens do not count."""
    generator = np.random.default_rng(3)
    counts = np.concatenate([np.arange(length) >= masked for length in LENGTHS])
    tokens = generator.integers(3, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    return pack(Documents(tokens, counts, np.array(LENGTHS)), 16, pad_id=1, packing=packing)


def objective(recipe: MethodOptions | tuple[MethodOptions, ...]) -> Objective:
    """A llama student of width 32 and a tied qwen2 teacher of width 48."""
    return objective_of(
        tiny("llama"), recipe, tiny("qwen2", 1, hidden_size=48, tie_word_embeddings=True)
    ).train()


def teacher_of(model: Objective) -> PreTrainedModel:
    """The teacher of an objective."""
    return model.models.teachers["teacher"]


class Padded:
    """Rows with `extra` columns of padding."""

    def __init__(self, rows: PackedRows, extra: int) -> None:
        self.rows, self.extra, self.lengths = rows, extra, rows.lengths

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """As the rows', but wider."""
        return self.rows.batch(index, device, width=int(self.lengths[index].max()) + self.extra)

    def count(self, index: Tensor) -> int:
        """As the rows'."""
        return self.rows.count(index)


def step(
    model: Objective, data: PackedRows, splits: int, extra: int = 0, order: list[int] | None = None
) -> tuple[float, dict[str, float], list[Tensor]]:
    """Loss, terms and gradients of one optimizer step whose batch is split into micro-batches."""
    model.zero_grad()
    rows = torch.tensor(order or list(range(len(data))))
    total, terms = 0.0, dict[str, float]()
    batch = model.prepare_step(model, Step(), rows, Padded(data, extra), Accelerator(cpu=True), splits)
    for micro_batch, scale in batch:
        loss, values = model(micro_batch, batch.divisor)
        (loss * scale).backward()
        total += loss.item() * scale
        for name, value in values.items():
            terms[name] = terms.get(name, 0.0) + value.item() * (scale > 0)
    return total, terms, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_softcap_and_scale_are_the_models_own(family: str) -> None:
    """A family whose head does more than a product, as student and as teacher, against the models' own logits."""
    teacher = tiny(family, 1)
    model = objective_of(tiny(family), method_options("kd", temperature=1.0, ce_weight=0.5), teacher)
    data = rows(packing=True)
    batch, divisor = data.batch(torch.arange(len(data)), CPU), data.count(torch.arange(len(data)))
    loss, _ = model(batch, divisor)
    options = {"input_ids": batch.input_ids, "position_ids": batch.positions, "use_cache": False}
    counted = batch.labels != IGNORED
    with torch.no_grad():
        ours, theirs = (
            m(**options).logits[counted].double().log_softmax(-1) for m in (model.student, teacher)
        )
    ce = -ours.gather(1, batch.labels[counted][:, None]).sum()
    wanted = (0.5 * ce + (theirs.exp() * (theirs - ours)).sum()) / divisor
    assert loss.item() == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_pieces_padding_and_packing_do_not_change_the_step(name: str) -> None:
    model = objective(RECIPES[name])
    alone, packed = rows(packing=False), rows(packing=True)
    loss, terms, grads = step(model, alone, 1)
    grads = [grad.clone() for grad in grads]
    assert len(grads) == len(list(model.parameters())), "every weight learns"
    assert len(packed) < len(alone) == 8
    for data, splits, extra, order in (
        (alone, 8, 0, None),
        (alone, 3, 0, [6, 1, 3, 2, 5, 7, 4, 0]),
        (alone, 1, 7, None),
        (packed, 1, 0, None),
        (packed, len(packed) + 1, 5, None),  # one of them is a filler
    ):
        other_loss, other_terms, other_grads = step(model, data, splits, extra, order)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_terms == pytest.approx(terms, rel=1e-4, abs=1e-4)
        for grad, other in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(other, grad, rtol=2e-3, atol=2e-6)


def test_loss_is_what_the_recipe_says() -> None:
    """Against the formula written out in float64 on the models' own logits and hidden states."""
    recipe = RECIPES["kd_features"]
    recipe = recipe.replaced(temperature=2.0, kd_weight=0.7)
    model, data = objective(recipe), rows(packing=False)
    batch = data.batch(torch.arange(8), CPU)
    divisor = data.count(torch.arange(8))
    loss, terms = model(batch, divisor)
    counted = batch.labels != IGNORED
    with torch.no_grad():
        options = {"input_ids": batch.input_ids, "position_ids": batch.positions, "use_cache": False}
        student = model.student(**options, output_hidden_states=True)
        teacher = teacher_of(model).double()(**options)
        teacher_of(model).float()
        ours, theirs = student.logits[counted].double(), teacher.logits[counted]
        ce = torch.nn.functional.cross_entropy(ours, batch.labels[counted], reduction="sum")
        log_p, log_q = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        divergence = 4 * (log_q.exp() * (log_q - log_p)).sum()
        from kdtrain.models.heads import hidden_states

        _, layers = hidden_states(model.student, batch.input_ids, batch.positions, (1, 2))  # type: ignore[arg-type]
        _, known = hidden_states(teacher_of(model), batch.input_ids, batch.positions, (2, 2))
        projections: Any = model.plan[0].projections
        features = [
            (projection(a[counted]) - b[counted]).square().mean(-1).sum()
            for projection, a, b in zip(projections, layers, known, strict=True)
        ]
        feature = torch.stack(features).sum()
    wanted_terms = {"kd": divergence, "ce": ce, "feature": feature / 2}
    assert list(terms) == list(wanted_terms)
    for name, value in wanted_terms.items():
        torch.testing.assert_close(terms[name].double(), value.double(), rtol=1e-5, atol=1e-5)
    wanted = (0.4 * ce + 0.7 * divergence + 0.3 * feature / 2) / divisor
    assert loss.item() == pytest.approx(float(wanted), rel=1e-5)


def test_weights_follow_the_step() -> None:
    recipe = method_options(
        "kd", temperature=1.0, last_temperature=4.0, last_kd_weight=0.0, ce_weight=0.2, last_ce_weight=1.0
    )
    model, data = objective(recipe), rows(packing=False)
    (method,) = model.plan
    assert method.weights(Step(0, 101)) == {"kd": 1.0, "ce": 0.2}
    assert method.weights(Step(25, 101)) == pytest.approx({"kd": 0.75, "ce": 0.4})
    batch, divisor = data.batch(torch.arange(8), CPU), data.count(torch.arange(8))
    student, teachers = model.outputs(batch)
    term = method.terms(Step(25, 101), batch, student, teachers)["kd"]
    assert isinstance(term, LogitTerm) and term.temperature == 1.75
    model.step = Step(10, 11)
    last, _ = model(batch, divisor)
    plain, _ = objective(method_options("ft"))(batch, divisor)
    assert last.item() == pytest.approx(plain.item(), rel=1e-6)


def test_teacher_is_no_part_of_the_student() -> None:
    model = objective(RECIPES["kd"])
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert all(name.startswith("student.") for name in names)
    assert not teacher_of(model).training and model.training


def test_student_equal_to_its_teacher_has_no_divergence() -> None:
    same = objective_of(tiny("qwen2"), method_options("kd", temperature=1.0, ce_weight=0.0), tiny("qwen2"))
    data = rows(packing=True)
    loss, _ = same(data.batch(torch.arange(len(data)), CPU), 10)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(float(p.grad.abs().max()) for p in same.parameters() if p.grad is not None) < 1e-5


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(
        KdtrainError, match=r"method.layer_map holds \[2, 5\], but the teacher has layers 1 to 2"
    ):
        objective(method_options("kd_features", layer_map=((2, 5),)))
