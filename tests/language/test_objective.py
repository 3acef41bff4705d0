"""One loss and one gradient, however a batch is cut, padded or packed; what each part of the objective is; the hooks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.models.heads import head_of
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.tasks.code_lm.documents import Documents
from kdtrain.tasks.code_lm.objective import LanguageObjective, Weights
from kdtrain.tasks.code_lm.packing import IGNORED, LanguageBatch, PackedRows, pack
from kdtrain.tasks.code_lm.recipe import LanguageMethodRecipe
from tests.language.conftest import VOCABULARY, tiny

CPU = torch.device("cpu")
LENGTHS = [9, 3, 14, 6, 2, 11, 5, 8]
RECIPES = {
    "ft": LanguageMethodRecipe(name="ft"),
    "kd": LanguageMethodRecipe(name="kd", temperature=2.0, kd_weight=0.7, ce_weight=0.4),
    "skew_kl": LanguageMethodRecipe(name="kd", divergence="skew_kl", ce_weight=0.2),
    "jsd": LanguageMethodRecipe(name="kd", divergence="jsd", beta=0.3, ce_weight=0.0),
    "kd_features": LanguageMethodRecipe(
        name="kd_features", layer_map=((1, 2), (2, 2)), feature_weight=0.3, ce_weight=0.4
    ),
}


def rows(*, packing: bool, masked: int = 1) -> PackedRows:
    """Eight documents of different lengths whose first tokens do not count."""
    generator = np.random.default_rng(3)
    counts = np.concatenate([np.arange(length) >= masked for length in LENGTHS])
    tokens = generator.integers(3, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    return pack(Documents(tokens, counts, np.array(LENGTHS)), 16, pad_id=1, packing=packing)


def objective(recipe: LanguageMethodRecipe, kind: type[LanguageObjective] = LanguageObjective) -> Any:
    """A llama student of width 32 and a tied qwen2 teacher of width 48."""
    model = tiny("qwen2", 1, hidden_size=48, tie_word_embeddings=True).requires_grad_(False)
    made = kind(tiny("llama"), recipe, LanguageTeacher("teacher", model, None))  # type: ignore[arg-type]
    return made.train()


def step(
    model: LanguageObjective, data: PackedRows, pieces: list[list[int]], extra: int = 0
) -> tuple[float, Tensor, list[Tensor]]:
    """Loss, terms and gradients of one optimizer step whose batch is cut into `pieces`."""
    model.zero_grad()
    divisor = data.count(torch.tensor([i for piece in pieces for i in piece]))
    total, terms = 0.0, []
    for piece in pieces:
        index = torch.tensor(piece)
        loss, sums = model(data.batch(index, CPU, width=int(data.lengths[index].max()) + extra), divisor)
        loss.backward()
        total += loss.item()
        terms.append(sums)
    return total, torch.stack(terms).sum(0), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_softcap_and_scale_are_the_models_own(family: str) -> None:
    """A family whose head does more than a product, as student and as teacher, against the models' own logits."""
    teacher = tiny(family, 1).requires_grad_(False)
    recipe = LanguageMethodRecipe(ce_weight=0.5)
    model = LanguageObjective(tiny(family), recipe, LanguageTeacher("teacher", teacher, None))  # type: ignore[arg-type]
    data = rows(packing=True)
    batch, divisor = data.batch(torch.arange(len(data)), CPU), data.count(torch.arange(len(data)))
    loss, _ = model(batch, divisor)
    options = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
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
    loss, terms, grads = step(model, alone, [list(range(8))])
    grads = [grad.clone() for grad in grads]
    assert len(grads) == len(list(model.parameters())), "every weight learns"
    assert len(packed) < len(alone) == 8
    for data, pieces, extra in (
        (alone, [[i] for i in range(8)], 0),
        (alone, [[6, 1], [2, 5, 7], [4, 0, 3]], 0),
        (alone, [list(range(8))], 7),
        (packed, [list(range(len(packed)))], 0),
        (packed, [[i] for i in range(len(packed))], 5),
    ):
        other_loss, other_terms, other_grads = step(model, data, pieces, extra)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other_terms, terms, rtol=1e-4, atol=1e-4)
        for grad, other in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(other, grad, rtol=2e-3, atol=2e-6)


def test_loss_is_what_the_recipe_says() -> None:
    """Against the formula written out in float64 on the models' own logits and hidden states."""
    recipe = RECIPES["kd_features"]
    recipe = replace(recipe, temperature=2.0, kd_weight=0.7)
    model, data = objective(recipe), rows(packing=False)
    batch = data.batch(torch.arange(8), CPU)
    divisor = data.count(torch.arange(8))
    loss, terms = model(batch, divisor)
    counted = batch.labels != IGNORED
    with torch.no_grad():
        options = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        student = model.student(**options, output_hidden_states=True)
        teacher = model.teacher.model.double()(**options)
        model.teacher.model.float()
        ours, theirs = student.logits[counted].double(), teacher.logits[counted]
        ce = torch.nn.functional.cross_entropy(ours, batch.labels[counted], reduction="sum")
        log_p, log_q = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        divergence = 4 * (log_q.exp() * (log_q - log_p)).sum()
        from kdtrain.models.heads import hidden_states

        _, layers = hidden_states(model.student, batch.input_ids, batch.position_ids, (1, 2))
        _, known = hidden_states(model.teacher.model, batch.input_ids, batch.position_ids, (2, 2))
        features = [
            (projection(a[counted]) - b[counted]).square().mean(-1).sum()
            for projection, a, b in zip(model.projections, layers, known, strict=True)
        ]
        feature = torch.stack(features).sum()
    torch.testing.assert_close(
        terms.double(), torch.stack([divergence, ce, feature / 2]), rtol=1e-5, atol=1e-5
    )
    wanted = (0.4 * ce + 0.7 * divergence + 0.3 * feature / 2) / divisor
    assert loss.item() == pytest.approx(float(wanted), rel=1e-5)


def test_weights_follow_the_step() -> None:
    recipe = LanguageMethodRecipe(last_temperature=4.0, last_kd_weight=0.0, ce_weight=0.2, last_ce_weight=1.0)
    assert Weights.at(recipe, 0.0) == Weights(1.0, 1.0, 0.2)
    assert Weights.at(recipe, 0.25) == Weights(1.75, 0.75, 0.2 + 0.25 * 0.8)
    model, data = objective(recipe), rows(packing=False)
    batch, divisor = data.batch(torch.arange(8), CPU), data.count(torch.arange(8))
    model.start_step(10, 11)
    last, _ = model(batch, divisor)
    plain, _ = objective(LanguageMethodRecipe(name="ft"))(batch, divisor)
    assert last.item() == pytest.approx(plain.item(), rel=1e-6)


def test_teacher_is_no_part_of_the_student() -> None:
    model = objective(RECIPES["kd"])
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert all(name.startswith("student.") for name in names)
    assert not model.teacher.model.training and model.training


def test_student_equal_to_its_teacher_has_no_divergence() -> None:
    model = tiny("qwen2").requires_grad_(False)
    same = LanguageObjective(
        tiny("qwen2"),
        LanguageMethodRecipe(ce_weight=0.0),
        LanguageTeacher("teacher", model, None),  # type: ignore[arg-type]
    )
    data = rows(packing=True)
    loss, _ = same(data.batch(torch.arange(len(data)), CPU), 10)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(float(p.grad.abs().max()) for p in same.parameters() if p.grad is not None) < 1e-5


class Uncertain(LanguageObjective):
    """Weighs the tokens about which the teacher is less sure than the median token of the whole batch three times."""

    @torch.no_grad()
    def token_statistic(self, piece: LanguageBatch) -> Tensor:
        assert self.teacher is not None
        hidden, _ = self.teacher.hidden(piece)
        log_p = head_of(self.teacher.model).logits(hidden).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def weigh(self, statistics: list[Tensor], whole: Tensor) -> list[Tensor]:
        return [torch.where(part > whole.median(), 3.0, 1.0) for part in statistics]


class Sampled(LanguageObjective):
    """Learns from what the student itself says: the second half of every row is replaced by its best tokens."""

    @torch.no_grad()
    def make_batch(self, piece: LanguageBatch) -> LanguageBatch:
        ids, labels = piece.input_ids.clone(), piece.labels.clone()
        for column in range(ids.shape[1] // 2, ids.shape[1] - 1):
            logits = self.student(input_ids=ids[:, : column + 1], use_cache=False).logits[:, -1]
            best = logits.argmax(-1)
            inside = labels[:, column] != IGNORED
            ids[inside, column + 1] = best[inside]
            labels[inside, column] = best[inside]
        labels[:, : ids.shape[1] // 2] = IGNORED
        return replace(piece, input_ids=ids, labels=labels)


@pytest.mark.parametrize("kind", [Uncertain, Sampled])
def test_hooks_see_the_whole_batch(kind: type[LanguageObjective]) -> None:
    """A statistic of the batch, or a batch of its own: the step does not depend on the pieces."""
    model, data = objective(RECIPES["kd"], kind), rows(packing=False)
    model.eval()
    accelerator = Accelerator(cpu=True)
    found = []
    for cuts in ([list(range(8))], [[0, 1, 2], [3, 4], [5, 6, 7]]):
        index = [torch.tensor(cut) for cut in cuts]
        pieces = [data.batch(cut, CPU, width=16) for cut in index]
        pieces, divisor = model.look_ahead(
            pieces, index, torch.arange(8), data.count(torch.arange(8)), accelerator
        )
        found.append(sum(model(piece, divisor)[0].item() for piece in pieces))
    plain = objective(RECIPES["kd"])(data.batch(torch.arange(8), CPU), data.count(torch.arange(8)))[0].item()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert abs(found[0] - plain) > 1e-3, "the hook changed something"


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(
        KdtrainError, match=r"method.layer_map holds \[2, 5\], but the teacher has layers 1 to 2"
    ):
        objective(LanguageMethodRecipe(name="kd_features", layer_map=((2, 5),)))
