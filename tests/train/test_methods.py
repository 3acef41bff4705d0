"""The study's methods against their formulas written out in float64, and their named values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdtrain.errors import KdtrainError
from kdtrain.methods.dist import CorrelationDistillation, correlation
from kdtrain.methods.layers import all_but_the_last
from kdtrain.models.loading import Shape, parameter_count
from kdtrain.models.students import build_student
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.recipe import MethodRecipe, StudentRecipe, recipe_from_dict
from kdtrain.recipe.presets import DEFAULTS, STUDENTS, STUDY
from kdtrain.tasks.classification.objective import Batch, WholeBatch
from kdtrain.tasks.classification.rows import UNLABELLED
from tests.train.test_objective import model_of, rows

SHAPE = Shape(layers=2, width=8)


def logits_batch(classes: int, count: int = 6) -> tuple[Tensor, Batch]:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(count, classes, generator=generator, requires_grad=True)
    nothing = torch.zeros(count, 1, dtype=torch.int64)
    labels = torch.arange(count) % classes
    labels[1] = UNLABELLED
    return student, Batch(nothing, nothing, labels, 2 * torch.randn(count, classes, generator=generator))


def test_dist_is_two_correlations() -> None:
    recipe = MethodRecipe(name="dist", temperature=3.0, inter_weight=0.5, intra_weight=2.0, ce_weight=0.25)
    logits, batch = logits_batch(5)
    assert batch.teacher_logits is not None
    terms = CorrelationDistillation(recipe, SHAPE, SHAPE).terms(logits, None, batch)
    p, q = ((z.detach().double() / 3).softmax(1).numpy() for z in (logits, batch.teacher_logits))
    import numpy as np

    inter = sum(1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6))
    intra = 6 * np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(5)])
    assert float(terms["inter"].detach()) == pytest.approx(9 * inter, rel=1e-5)
    assert float(terms["intra"].detach()) == pytest.approx(9 * intra, rel=1e-5)


def test_dist_of_a_cut_batch_has_the_gradient_of_the_whole() -> None:
    method = CorrelationDistillation(MethodRecipe(name="dist", temperature=2.0), SHAPE, SHAPE)
    logits, batch = logits_batch(4)
    assert batch.teacher_logits is not None
    whole = method.terms(logits, None, batch)["intra"]
    (expected,) = torch.autograd.grad(whole, logits)
    values, gradients = [], []
    for index in (torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5])):
        part = replace(
            batch,
            labels=batch.labels[index],
            teacher_logits=batch.teacher_logits[index],
            whole=WholeBatch(logits.detach(), batch.teacher_logits, index),
        )
        value = method.terms(logits[index], None, part)["intra"]
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, logits)[0])
    torch.testing.assert_close(torch.stack(values).sum(), whole.detach())
    torch.testing.assert_close(gradients[0] + gradients[1], expected)


def test_dist_has_no_gradient_across_two_classes() -> None:
    logits, batch = logits_batch(2)
    terms = CorrelationDistillation(MethodRecipe(name="dist"), SHAPE, SHAPE).terms(logits, None, batch)
    (inter,) = torch.autograd.grad(terms["inter"], logits, retain_graph=True)
    (intra,) = torch.autograd.grad(terms["intra"], logits)
    assert float(inter.abs().max()) < 1e-4 < 1e-2 < float(intra.abs().max())


def test_correlation_of_a_constant_is_zero() -> None:
    assert correlation(torch.ones(2, 4), torch.randn(2, 4)).tolist() == [0.0, 0.0]


def test_pkd_compares_directions_and_leaves_the_last_layer_out() -> None:
    model = model_of("pkd", feature_weight=100.0)
    assert model.method.student_layers == (1,) and model.method.teacher_layers == (2,)
    assert all_but_the_last(((1, 4),)) == ((1, 4),)
    batch = rows(list(range(7)), model.method)
    assert batch.teacher_states is not None
    _, terms = model(batch, 7)
    hidden = model.student(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states[1][:, 0]
    mapped = model.method.projections[0](batch.teacher_states[:, 0])  # type: ignore[index]
    expected = ((normalize(hidden.double()) - normalize(mapped.double())) ** 2).mean(1).sum()
    found = terms[list(model.method.weights).index("feature")]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_ckd_compares_relations_of_tokens_and_of_layers() -> None:
    """One row of 4 tokens, window 1, against loops over pairs and triples."""
    model = model_of("ckd", window=1, layer_weight=0.5)
    assert model.method.student_layers == (0, 1, 2) and model.method.teacher_layers == (0, 2, 4)
    batch = rows([5], model.method)
    assert batch.teacher_states is not None
    _, terms = model(batch, 1)
    hidden = model.student(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states
    sides = [torch.stack(list(hidden))[:, 0].double(), batch.teacher_states[0, :, :4].double()]  # (L, N, D)

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
    found = terms[list(model.method.weights).index("relation")]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_ckd_of_a_bigru_has_no_embeddings_to_compare() -> None:
    model = model_of("ckd", "bigru")
    assert model.method.student_layers == (1, 2) and model.method.teacher_layers == (2, 4)
    with pytest.raises(KdtrainError, match="token by token and needs a Transformer teacher"):
        type(model.method)(MethodRecipe(name="ckd"), SHAPE, Shape(2, 8, embeddings=False))


def test_the_studys_values_and_what_a_recipe_says_wins() -> None:
    content = {"data": {"path": "x"}, "method": {"name": "ckd", "preset": "study", "window": 5}}
    recipe = recipe_from_dict(content)
    assert (recipe.method.temperature, recipe.method.feature_weight, recipe.method.layer_weight) == (
        3.0,
        10.0,
        10.0,
    )
    assert (recipe.method.kd_weight, recipe.method.ce_weight, recipe.method.window) == (1.0, 0.0, 5)
    assert (recipe.training.batch_size, recipe.training.learning_rate, recipe.training.epochs) == (
        16,
        3e-5,
        5,
    )
    # The study's divergence has no T squared: T^2 times the weight is 1.
    for name, weight in (("kd", "kd_weight"), ("dist", "inter_weight"), ("dist", "intra_weight")):
        method = STUDY[name]["method"]
        assert method["temperature"] ** 2 * method[weight] == pytest.approx(1.0)
    given = recipe_from_dict({**content, "method": {"name": "pkd"}})
    assert given.method.feature_weight == DEFAULTS["pkd"]["feature_weight"]


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"student": {"preset": "roberta-8M"}}, "student.preset must be one of roberta-124M"),
        ({"method": {"name": "kd", "preset": "paper"}}, "method.preset must be study, got 'paper'"),
        ({"method": {"name": "kd_features", "preset": "study"}}, "knows the methods ft, kd, dist, pkd, ckd"),
    ],
)
def test_presets_that_do_not_exist(section: dict[str, dict[str, str]], sentence: str) -> None:
    with pytest.raises(KdtrainError, match=sentence):
        recipe_from_dict({"data": {"path": "x"}, **section})


@pytest.mark.parametrize("name", list(STUDENTS))
def test_named_students_have_their_size(name: str) -> None:
    """Within a tenth, and a BiGRU within 3 % of what the study's shapes count to."""
    recipe = recipe_from_dict({"data": {"path": "x"}, "student": {"preset": name}}).student
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


def test_a_student_without_preset_is_as_before() -> None:
    assert recipe_from_dict({"data": {"path": "x"}}).student == StudentRecipe()
