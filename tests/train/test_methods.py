"""The study's methods against their formulas written out in float64, and their named values."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdkernels import TeacherLogits
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.methods.base import Step
from kdtrain.methods.dist import CorrelationDistillation, correlation
from kdtrain.methods.layers import all_but_the_last
from kdtrain.models.loading import Shape, parameter_count
from kdtrain.models.students import build_student
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.outputs import IGNORED, Batch, LogitOutputs, Shared, TeacherOutputs
from kdtrain.recipe import StudentSection
from kdtrain.recipe.presets import STUDENTS, STUDY
from kdtrain.tasks.recipes import recipe_from_dict
from tests.train.test_objective import model_of, rows

SHAPE = Shape(layers=2, width=8)


def logits_of(classes: int, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student (a leaf) and of a teacher, and labels, one of which is missing."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(count, classes, generator=generator, requires_grad=True)
    labels = torch.arange(count) % classes
    labels[1] = IGNORED
    return student, 2 * torch.randn(count, classes, generator=generator), labels


def dist_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, index: Tensor | None = None, **options: float
) -> dict[str, Tensor]:
    """The terms of dist of all rows, or of the micro-batch of these rows."""
    method = CorrelationDistillation(
        CorrelationDistillation.Options(**options),  # type: ignore[arg-type]
        SHAPE,
        {"teacher": SHAPE},
    )
    index = torch.arange(len(labels)) if index is None else index
    nothing = torch.zeros(len(index), 1, dtype=torch.int64)
    whole = {"student": Shared(student.detach(), index), "teacher": Shared(teacher, index)}
    batch = Batch(nothing, labels[index], index, whole=whole)
    outputs = LogitOutputs(logits=student[index], labels=labels[index])
    known = TeacherOutputs(target=TeacherLogits(teacher[index]))
    terms = method.terms(Step(), batch, outputs, {"teacher": known})
    return {name: term for name, term in terms.items() if isinstance(term, Tensor)}


def test_dist_is_two_correlations() -> None:
    student, teacher, labels = logits_of(5)
    terms = dist_terms(student, teacher, labels, temperature=3.0, inter_weight=0.5, intra_weight=2.0)
    p, q = ((z.detach().double() / 3).softmax(1).numpy() for z in (student, teacher))
    inter = sum(1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6))
    intra = 6 * np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(5)])
    assert float(terms["inter"].detach()) == pytest.approx(9 * inter, rel=1e-5)
    assert float(terms["intra"].detach()) == pytest.approx(9 * intra, rel=1e-5)


def test_dist_of_a_split_batch_has_the_gradient_of_the_whole() -> None:
    logits, teacher, labels = logits_of(4)
    whole = dist_terms(logits, teacher, labels, temperature=2.0)["intra"]
    (expected,) = torch.autograd.grad(whole, logits)
    values, gradients = [], []
    for index in (torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5])):
        value = dist_terms(logits, teacher, labels, index, temperature=2.0)["intra"]
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, logits)[0])
    torch.testing.assert_close(torch.stack(values).sum(), whole.detach())
    torch.testing.assert_close(gradients[0] + gradients[1], expected)


def test_dist_has_no_gradient_across_two_classes() -> None:
    logits, teacher, labels = logits_of(2)
    terms = dist_terms(logits, teacher, labels)
    (inter,) = torch.autograd.grad(terms["inter"], logits, retain_graph=True)
    (intra,) = torch.autograd.grad(terms["intra"], logits)
    assert float(inter.abs().max()) < 1e-4 < 1e-2 < float(intra.abs().max())


def test_correlation_of_a_constant_is_zero() -> None:
    assert correlation(torch.ones(2, 4), torch.randn(2, 4)).tolist() == [0.0, 0.0]


def test_pkd_compares_directions_and_leaves_the_last_layer_out() -> None:
    model = model_of("pkd", feature_weight=100.0)
    assert model.plan[0].needs().layers == ((1, 2),)
    assert all_but_the_last(((1, 4),)) == ((1, 4),)
    batch = rows(list(range(7)), model)
    known = batch.stored["teacher"]["states"]
    _, terms = model(batch, 7)
    hidden = model.student(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states[1][:, 0]
    mapped = model.plan[0].projections[0](known[:, 0])  # type: ignore[index]
    expected = ((normalize(hidden.double()) - normalize(mapped.double())) ** 2).mean(1).sum()
    found = terms["feature"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_ckd_compares_relations_of_tokens_and_of_layers() -> None:
    """One row of 4 tokens, window 1, against loops over pairs and triples."""
    model = model_of("ckd", window=1, layer_weight=0.5)
    assert model.plan[0].needs().tokens == ((0, 0), (1, 2), (2, 4))
    batch = rows([5], model)
    known = batch.stored["teacher"]["states"]
    _, terms = model(batch, 1)
    hidden = model.student(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states
    sides = [torch.stack(list(hidden))[:, 0].double(), known[0, :, :4].double()]  # (L, N, D)

    def error(axis: list[Tensor], window: int) -> Tensor:
        pairs, triples = [], []
        for sequence in range(len(axis[0])):
            for i in range(axis[0].shape[1]):
                near = [j for j in range(axis[0].shape[1]) if abs(i - j) <= window]
                ours, theirs = axis[0][sequence], axis[1][sequence]
                for j in near:
                    values = [1 - normalize(f[i], dim=0) @ normalize(f[j], dim=0) for f in (ours, theirs)]
                    pairs.append((values[0] - values[1]) ** 2)
                    for k in near:
                        values = [
                            normalize(f[i] - f[j], dim=0) @ normalize(f[i] - f[k], dim=0)
                            for f in (ours, theirs)
                        ]
                        triples.append((values[0] - values[1]) ** 2)
        return torch.stack(pairs).mean() + torch.stack(triples).mean()

    expected = error(sides, 1) + 0.5 * error([side.transpose(0, 1) for side in sides], 1)
    found = terms["relation"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_ckd_of_a_bigru_has_no_embeddings_to_compare() -> None:
    model = model_of("ckd", "bigru")
    assert model.plan[0].needs().tokens == ((1, 2), (2, 4))
    with pytest.raises(KdtrainError, match="token by token and needs a Transformer teacher"):
        method_class("ckd")(model.plan[0].options, SHAPE, {"teacher": Shape(2, 8, embeddings=False)})


def test_the_studys_values_and_what_a_recipe_says_wins() -> None:
    content = {
        "task": "classification",
        "data": {"path": "x"},
        "method": {"name": "ckd", "preset": "study", "window": 5},
    }
    content["teacher"] = {"path": "t"}
    recipe = recipe_from_dict(content)
    method: Any = recipe.methods[0]
    assert (method.temperature, method.feature_weight, method.layer_weight) == (
        3.0,
        10.0,
        10.0,
    )
    assert (method.kd_weight, method.ce_weight, method.window) == (1.0, 0.0, 5)
    assert (recipe.training.batch_size, recipe.training.learning_rate, recipe.training.num_train_epochs) == (
        16,
        3e-5,
        5,
    )
    # The study's divergence has no T squared: T^2 times the weight is 1.
    for name, weight in (("kd", "kd_weight"), ("dist", "inter_weight"), ("dist", "intra_weight")):
        method = STUDY[name]["method"]
        assert method["temperature"] ** 2 * method[weight] == pytest.approx(1.0)
    given = recipe_from_dict({**content, "method": {"name": "pkd"}})
    pkd: Any = given.methods[0]
    assert pkd.feature_weight == 100.0


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"student": {"preset": "roberta-8M"}}, "student.preset must be one of roberta-124M"),
        ({"method": {"name": "kd", "preset": "paper"}}, "method.preset must be study, got 'paper'"),
        (
            {"method": {"name": "kd_features", "preset": "study"}},
            "has values for the methods ft, kd, dist, pkd, ckd",
        ),
    ],
)
def test_presets_that_do_not_exist(section: dict[str, dict[str, str]], sentence: str) -> None:
    with pytest.raises(KdtrainError, match=sentence):
        recipe_from_dict(
            {"task": "classification", "data": {"path": "x"}, "method": {"name": "ft"}, **section}
        )


@pytest.mark.parametrize("name", list(STUDENTS))
def test_named_students_have_their_size(name: str) -> None:
    """Within a tenth, and a BiGRU within 3 % of what the study's shapes count to."""
    recipe = StudentSection.parse({"preset": name})
    tokenizer = train_tokenizer(["def f(x): return x"], vocab_size=300, max_length=512)
    with torch.device("meta"):
        model = build_student(recipe, tokenizer, ("a", "b"))
        width = model.get_input_embeddings().embedding_dim
        size = parameter_count(model) + (recipe.vocab_size - len(tokenizer)) * int(width)  # type: ignore[arg-type]
    nominal = float(name.split("-")[1].removesuffix("M")) * 1e6
    assert size == pytest.approx(nominal, rel=0.1)
    published = {"bigru-124M": 122.6e6, "bigru-30M": 30.5e6, "bigru-7M": 7.1e6, "bigru-1.5M": 1.5e6}
    if name in published:
        assert size == pytest.approx(published[name], rel=0.03)
