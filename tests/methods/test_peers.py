"""Students that teach each other: DML (arXiv 1706.00384) and ONE (arXiv 1806.04606), in float64 on tiny models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.methods.base import Method
from kdtrain.models.loading import Shape
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED, Batch
from kdtrain.tasks.classification.outputs import Classifiers
from kdtrain.tasks.code_lm.outputs import LanguageModels
from tests.language.conftest import tiny
from tests.language.test_objective import CPU, rows

CLASSES = 5


def classifier() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, initializer_range=0.5,
    )  # fmt: skip
    config.num_labels = CLASSES
    return RobertaForSequenceClassification(config).eval()


def texts() -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(4, 60, (6, 9))
    labels = torch.tensor([0, 1, IGNORED, 3, 4, 0])
    return Batch(ids, labels, torch.arange(6), attention_mask=torch.ones_like(ids))


def built(name: str, **options: Any) -> tuple[Objective, Method]:
    kind = method_class(name)
    method = kind(kind.Options(**options), Shape(2, 8), {})
    return Objective(classifier(), [method], Classifiers()).eval(), method


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = (z.detach().double() / temperature for z in (teacher, student))
    return temperature**2 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.detach().double(), labels, reduction="sum", ignore_index=IGNORED)


def test_mutual_learning_1706_00384() -> None:
    objective, method = built("dml", kd_weight=0.7, ce_weight=0.4)
    batch = texts()
    peer: Any = method.peer
    ours, theirs = (
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for model in (objective.student, peer)
    )
    loss, _ = objective(batch, 1)
    expected = sum(
        0.7 * kl(b, a, 1.0) + 0.4 * ce(a, batch.labels) for a, b in ((ours, theirs), (theirs, ours))
    )
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    own = next(iter(objective.student.parameters())).grad
    peers = next(iter(peer.parameters())).grad
    assert own is not None and peers is not None and float(own.norm()) > 0 < float(peers.norm())


def test_the_gradient_of_each_student_is_of_its_own_loss() -> None:
    objective, method = built("dml")
    batch = texts()
    parameters = list(objective.student.parameters())
    loss, _ = objective(batch, 1)
    both = torch.autograd.grad(loss, parameters, allow_unused=True)
    peer: Any = method.peer
    target = peer(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.detach()
    logits = objective.student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    own = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="sum")
    own = own + F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=IGNORED)
    for found, wanted in zip(both, torch.autograd.grad(own, parameters, allow_unused=True), strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_language_models_learn_from_each_other() -> None:
    student = tiny("llama")
    kind = method_class("dml")
    method = kind(kind.Options(peer="copy"), Shape(2, 32), {})  # type: ignore[call-arg]
    objective = Objective(student, [method], LanguageModels())
    data = rows(packing=True)
    batch = data.batch(torch.arange(len(data)), CPU)
    _, values = objective(batch, 1)
    assert float(values["kd"]) == pytest.approx(0.0, abs=1e-4), "equal students have nothing to teach"
    assert float(values["peer"]) == pytest.approx(float(values["ce"]), rel=1e-5)


def test_gated_ensemble_1806_04606() -> None:
    objective, method = built("one", branches=2, stem_layer=1, kd_weight=0.5, ce_weight=2.0)
    batch, model = texts(), objective.student
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    state = output.hidden_states[1][:, 0]
    every: list[Tensor] = [output.logits, *(branch(state) for branch in method.branches)]  # type: ignore[operator, union-attr]
    gate = method.gate(state).double().softmax(1)  # type: ignore[operator]
    ensemble = sum(gate[:, i : i + 1] * z.double() for i, z in enumerate(every))
    assert isinstance(ensemble, Tensor)
    loss, _ = objective(batch, 1)
    expected = sum(2.0 * ce(z, batch.labels) + 0.5 * kl(ensemble, z, 3.0) for z in every)
    expected = expected + 2.0 * ce(ensemble, batch.labels)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["dml", "one"])
def test_split_batches_have_the_gradient_of_the_whole(name: str) -> None:
    objective, _ = built(name)
    batch = texts()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    whole = torch.autograd.grad(objective(batch, 6)[0], parameters, allow_unused=True)
    parts = []
    for index in (torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5])):
        part = Batch(batch.input_ids[index], batch.labels[index], index, attention_mask=torch.ones(len(index), 9, dtype=torch.int64))  # fmt: skip
        parts.append(torch.autograd.grad(objective(part, 6)[0], parameters, allow_unused=True))
    for one, two, wanted in zip(*parts, whole, strict=True):
        if wanted is not None:
            torch.testing.assert_close(one + two, wanted, rtol=1e-4, atol=1e-5)


def test_a_stem_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KdtrainError, match=r"method.stem_layer is 3, but the student has layers 1 to 2"):
        built("one", stem_layer=3)
