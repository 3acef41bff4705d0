"""The objective: one sum over one count, whatever the pieces; padding that does not matter; what each method adds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

from kdtrain.errors import KdtrainError
from kdtrain.methods import METHODS, build_methods, method_class
from kdtrain.methods.base import Step
from kdtrain.methods.layers import layer_pairs
from kdtrain.models.bigru import BiGRUForSequenceClassification
from kdtrain.models.bigru_config import BiGRUConfig
from kdtrain.models.loading import Shape, shape_of
from kdtrain.objective import Objective, teacher_layers
from kdtrain.outputs import IGNORED, Batch
from kdtrain.tasks.classification.outputs import Classifiers

CLASSES, TEACHER = 5, Shape(layers=4, width=24)
LENGTHS = [19, 3, 11, 7, 16, 4, 9]


def student(architecture: str) -> RobertaForSequenceClassification | BiGRUForSequenceClassification:
    """Two layers of width 16 without dropout."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_labels": CLASSES,
    }
    if architecture == "bigru":
        return BiGRUForSequenceClassification(BiGRUConfig(**shape, hidden_dropout_prob=0.0))
    return RobertaForSequenceClassification(
        RobertaConfig(
            **shape,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


CLASSIFIED = [name for name, kind in METHODS.items() if "classification" in kind.tasks]
GIVEN = {"temperature": 3.0, "kd_weight": 0.7, "ce_weight": 0.4}
NEEDED: dict[str, dict[str, Any]] = {"routed": {"teacher_weights": {"teacher": 0.7, "small": 0.3}}}
"""options without a default"""
TRANSFORMERS_ONLY = ["dpk"]
CASES = [
    (method, architecture)
    for method in CLASSIFIED
    for architecture in ("roberta", "bigru")
    if architecture == "roberta" or method not in TRANSFORMERS_ONLY
]


def model_of(method: str, architecture: str = "roberta", **options: Any) -> Objective:
    """A student of two layers with one method; weights and temperature differ from every default."""
    encoder, kind = student(architecture), method_class(method).Options
    given = {name: value for name, value in GIVEN.items() if name in kind.model_fields}
    chosen = kind.parse({**given, **NEEDED.get(method, {}), **options, "name": method})
    shape = shape_of(encoder.config)
    teacher = Shape(TEACHER.layers, teacher_width(method, shape))
    teachers = {"teacher": teacher, "small": teacher}
    return Objective(encoder, build_methods([chosen], "classification", shape, teachers), Classifiers())


def teacher_width(method: str, student: Shape) -> int:
    """That of the student for the method that needs equal widths."""
    return student.width if method == "fsp" else TEACHER.width


def rows(index: list[int], model: Objective, *, extra: int = 0) -> Batch:
    """The given rows of one fixed data set, padded to their longest and `extra` more."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 50, (len(LENGTHS), 20), generator=generator)
    labels = torch.tensor([0, 1, IGNORED, 3, 4, IGNORED, 2])
    logits = 2 * torch.randn(len(LENGTHS), CLASSES, generator=generator)
    wide = teacher_width(model.plan[0].options.name, shape_of(model.student.config))  # type: ignore[arg-type]
    states = torch.randn(len(LENGTHS), 5, wide, generator=generator)
    width = max(LENGTHS[i] for i in index) + extra
    ids, mask = torch.full((len(index), width), 1), torch.zeros(len(index), width, dtype=torch.int64)
    for row, i in enumerate(index):
        ids[row, : LENGTHS[i]] = tokens[i, : LENGTHS[i]]
        mask[row, : LENGTHS[i]] = 1
    layers = teacher_layers(model.plan, "teacher")
    outputs = {"logits": logits[index]}
    if layers.tokens:
        # Sequences of the teacher, padded to the teacher's own length: two tokens more than the student has.
        sequences = torch.randn(len(LENGTHS), 5, 22, wide, generator=generator)[index]
        sequences = sequences[:, list(layers.tokens)]
        longest = max(LENGTHS[i] for i in index) + 2
        inside = torch.arange(longest) < torch.tensor([LENGTHS[i] + 2 for i in index])[:, None]
        outputs["states"] = sequences[:, :, :longest].masked_fill(~inside[:, None, :, None], 1e4)
        outputs["mask"] = inside
    elif layers.states:
        outputs["states"] = states[index][:, list(layers.states)]
    stored = {"teacher": outputs, "small": {"logits": logits.flip(0)[index]}}
    return Batch(ids, labels[index], torch.tensor(index), mask, stored=stored)


class FixedRows:
    """Those rows as training data."""

    def __init__(self, model: Objective, extra: int = 0) -> None:
        self.model, self.extra = model, extra
        self.lengths = torch.tensor(LENGTHS)

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """As `rows`."""
        batch = rows(index.tolist(), self.model, extra=self.extra)
        return batch if stored else replace(batch, stored={})

    def count(self, index: Tensor) -> int:
        """Rows."""
        return len(index)


def step(
    model: Objective, index: list[int], splits: int, extra: int = 0
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss, terms and gradients of one optimizer step whose batch is split into micro-batches."""
    model.zero_grad()
    total, terms = torch.zeros(()), dict[str, Tensor]()
    data, accelerator = FixedRows(model, extra), Accelerator()
    batch = model.prepare_step(model, Step(), torch.tensor(index), data, accelerator, splits)
    for micro_batch, scale in batch:
        loss, values = model(micro_batch, batch.divisor)
        (loss * scale).backward()
        total += loss.detach() * scale
        for name, value in values.items():
            terms[name] = terms.get(name, torch.zeros(())) + value * (scale > 0)
    return total, terms, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("method", "architecture"), CASES)
def test_pieces_and_padding_do_not_change_the_step(method: str, architecture: str) -> None:
    """1 x 7, 7 x 1 and uneven micro-batches, one with unlabelled rows only, fillers, any padding: one loss, one gradient."""
    model = model_of(method, architecture)
    loss, terms, grads = step(model, [0, 1, 2, 3, 4, 5, 6], 1)
    assert len(grads) == len([p for p in model.parameters() if p.requires_grad])
    # dist divides by the spread of the student's probabilities, next to nothing before any training, and ckd by the
    # length of differences between neighbours: both magnify rounding (in float64 the same differences are 2e-14).
    largest = max(1.0, *(float(grad.abs().max()) for grad in grads))
    for index, splits, extra in (
        ([0, 1, 2, 3, 4, 5, 6], 7, 0),
        ([4, 0, 3, 6, 1, 2, 5], 3, 0),
        ([6, 1, 3, 2, 5, 4, 0], 9, 0),
        ([0, 1, 2, 3, 4, 5, 6], 1, 13),
    ):
        other_loss, other_terms, other_grads = step(model, index, splits, extra)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_terms, terms, rtol=1e-5, atol=1e-5)
        for grad, other in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(other, grad, rtol=1e-4, atol=4e-6 * largest)


def test_loss_is_what_the_recipe_says() -> None:
    """Against the formula written out in float64."""
    model = model_of("kd_features", layer_map=((1, 3), (2, 4)), feature_weight=0.3)
    batch = rows(list(range(7)), model)
    loss, _ = model(batch, 7)
    output = model.student(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    )
    outputs = batch.stored["teacher"]
    s, t = output.logits.double(), outputs["logits"].double()
    p = (t / 3).softmax(1)
    kd = 9 * (p * (p.log() - (s / 3).log_softmax(1))).sum()
    labelled = batch.labels != IGNORED
    ce = -s.log_softmax(1)[labelled, batch.labels[labelled]].sum()
    feature = torch.zeros((), dtype=torch.float64)
    for i, layer in enumerate((1, 2)):
        mapped = model.plan[0].projections[i](output.hidden_states[layer][:, 0]).double()  # type: ignore[index]
        feature += ((mapped - outputs["states"][:, i].double()) ** 2).mean(1).sum() / 2
    torch.testing.assert_close(loss.double(), (0.7 * kd + 0.4 * ce + 0.3 * feature) / 7, rtol=1e-5, atol=1e-6)


def test_projection_may_map_the_teacher() -> None:
    model = model_of("kd_features", project="teacher")
    loss, _, _ = step(model, [0, 1, 2], 1)
    assert torch.isfinite(loss)
    assert [tuple(p.weight.shape) for p in model.plan[0].projections] == [(16, 24)] * 2  # type: ignore[union-attr]


def test_student_equal_to_teacher_has_no_divergence() -> None:
    model = model_of("kd")
    batch = rows([0, 1, 2], model)
    with torch.no_grad():
        logits = model.student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    _, terms = model(replace(batch, stored={"teacher": {"logits": logits}}), 3)
    assert abs(float(terms["kd"])) < 1e-5


def test_unlabelled_rows_have_no_cross_entropy() -> None:
    model = model_of("kd")
    _, terms = model(rows([2, 5], model), 2)
    assert terms["ce"] == 0.0
    loss, _, grads = step(model, [2, 5], 1)
    assert torch.isfinite(loss) and all(bool(grad.isfinite().all()) for grad in grads)


def test_losses_leave_autocast() -> None:
    """Under bf16 matrix products the terms are still float32."""
    model = model_of("kd_features")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = model(rows([0, 1, 2, 3], model), 4)
    assert {loss.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    loss.backward()


def test_layer_pairs() -> None:
    assert layer_pairs((), 2, 4) == ((1, 2), (2, 4))
    assert layer_pairs((), 3, 12) == ((1, 4), (2, 8), (3, 12))
    assert layer_pairs((), 4, 2) == ((1, 1), (2, 1), (3, 2), (4, 2))
    assert layer_pairs(((2, 2),), 2, 4) == ((2, 2),)
    for pair, side in (((3, 1), "student has layers 1 to 2"), ((1, 5), "teacher has layers 1 to 4")):
        with pytest.raises(KdtrainError, match=side):
            layer_pairs((pair,), 2, 4)


def test_unknown_method() -> None:
    with pytest.raises(KdtrainError, match=r"method.name must be one of ft, kd, kd_features, .*, got 'nkd'"):
        method_class("nkd")
