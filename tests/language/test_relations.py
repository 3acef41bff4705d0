"""Relations of tokens inside attention: what is kept are the models' own maps, and packing changes nothing."""

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from kdtrain.engine.layers import recompute_layers
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.methods.relations import split_documents
from kdtrain.models.attention import attention_inputs
from kdtrain.models.heads import hidden_states
from kdtrain.outputs import IGNORED
from tests.language.conftest import FAMILIES, VOCABULARY, objective_of, tiny
from tests.language.test_objective import CPU, objective, rows

KD = method_options("kd", temperature=1.0)
STATES = method_options("kd_features", temperature=1.0, layer_map=((1, 2), (2, 2)))
MAPS = method_options(
    "relations", relations=("attention", "values"), relation_weight=0.3, layer_map=((1, 2), (2, 2))
)


def eager(family: str, seed: int, **changes: int) -> PreTrainedModel:
    model = tiny(family, seed, **changes)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama_tied"])
# "eager" is each family's own function, "default" mostly the one that they share.
@pytest.mark.parametrize("implementation", ["eager", "default"])
def test_kept_queries_and_keys_give_the_models_own_maps(family: str, implementation: str) -> None:
    model = tiny(family, attn_logit_softcapping=None) if family == "gemma2" else tiny(family)
    ids, places = torch.randint(VOCABULARY, (2, 11)), torch.arange(11).expand(2, -1)
    if implementation == "eager":
        model.set_attn_implementation("eager")
    with torch.no_grad(), attention_inputs(model, (2,)) as found:
        hidden, _ = hidden_states(model, ids, places)
    assert torch.equal(hidden, hidden_states(model, ids, places)[0]), "the model runs as without"
    query, key = found[2].of("attention")
    assert key is not None
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    ours = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    torch.testing.assert_close(ours, maps[1], rtol=1e-4, atol=1e-5)


def maps_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """(H, n, n) float64 attention maps of every layer on one document."""
    output = model.double()(input_ids=ids[None], use_cache=False, output_attentions=True)
    model.float()
    return [found[0].detach() for found in output.attentions]


def test_loss_is_the_divergence_of_the_maps() -> None:
    """Against the models' own maps, document by document; keys of grouped queries count once for each query."""
    teacher = eager("qwen2", 1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    student = eager("llama", 0, num_key_value_heads=1)
    recipe = (KD, MAPS.replaced(relations=("attention",)))
    model = objective_of(student, recipe, teacher).eval()
    packed, alone = rows(packing=True, masked=2), rows(packing=False, masked=2)
    divisor = packed.count(torch.arange(len(packed)))
    batch = packed.batch(torch.arange(len(packed)), CPU, width=19)
    _, terms = model(batch, divisor)
    wanted = 0.0
    for row in range(len(alone)):
        one = alone.batch(torch.tensor([row]), CPU)
        counted = one.labels[0] != IGNORED
        ours, theirs = maps_of(student, one.input_ids[0]), maps_of(teacher, one.input_ids[0])
        for layer in (0, 1):
            p, q = theirs[1], ours[layer].repeat_interleave(2, 0)
            divergence = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1).mean(0)
            wanted += float(divergence[counted].sum()) / 2
    assert list(terms) == ["kd", "ce", "relation"]
    assert terms["relation"].item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_pieces_packing_and_recomputed_layers_do_not_change_the_step(checkpointing: bool) -> None:
    maps = MAPS.replaced(relations=("attention", "queries", "keys", "values"), relation_heads=4)
    recipe = (STATES, maps)
    results = []
    for data, cuts in (
        (rows(packing=False), [list(range(8))]),
        (rows(packing=False), [[6, 1], [2, 5, 7], [4, 0, 3]]),
        (rows(packing=True), [list(range(len(rows(packing=True))))]),
    ):
        model = objective(recipe)
        torch.manual_seed(1)
        torch.nn.init.normal_(model.plan[0].projections[0].weight)  # type: ignore[index]
        if checkpointing and results:  # against the first, which keeps its layers
            recompute_layers(model.student)
        total = 0.0
        for cut in cuts:
            loss, _ = model(data.batch(torch.tensor(cut), CPU), data.count(torch.arange(len(data))))
            loss.backward()
            total += loss.item()
        results.append((total, [p.grad for p in model.student.parameters() if p.grad is not None]))
    assert len(results[0][1]) == len(list(model.student.parameters()))
    for total, grads in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        for grad, other in zip(results[0][1], grads, strict=True):
            torch.testing.assert_close(other, grad, rtol=2e-3, atol=5e-6)


def test_documents_are_grouped_by_length() -> None:
    """1, 2 to 3, 4 to 7, ... tokens; what has no label that counts is left out."""
    places = torch.tensor([[0, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    labels = torch.zeros_like(places)
    labels[0, 6:], labels[1, 1] = IGNORED, IGNORED
    groups = split_documents(places, labels)
    assert [group.tokens.tolist() for group in groups] == [
        [[0]],
        [[15, 16, 17]],
        [[1, 2, 3, 4, 5, 1], [9, 10, 11, 12, 13, 14]],
    ]
    assert groups[2].inside.tolist() == [[True] * 5 + [False], [True] * 6]
    assert groups[2].counted.tolist() == [[True] * 5 + [False], [True, False, True, True, True, True]]


def test_what_cannot_be_compared_is_told() -> None:
    teacher = tiny("qwen2", 1, hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(
        KdtrainError,
        match=r"the student has 2 heads of attention, the teacher 3, .* set method.relation_heads to a number",
    ):
        objective_of(tiny("llama"), MAPS, teacher)
    with pytest.raises(
        KdtrainError, match=r"relation_heads is 5, which does not divide the width 32 of the student's"
    ):
        objective_of(tiny("llama"), MAPS.replaced(relation_heads=5), teacher)
    objective_of(tiny("llama"), MAPS.replaced(relation_heads=4), teacher)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(KdtrainError, match=r"the student does not show the inputs of its attention"):
        objective_of(bloom, MAPS, teacher)
    with pytest.raises(KdtrainError, match=r"method.relations must name one or more of attention"):
        MAPS.replaced(relations=("values", "values"))
