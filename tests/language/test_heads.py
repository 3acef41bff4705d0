"""(hidden, head) gives a model's own logits, for every family; documents that share a row do not see each other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from kdtrain.errors import KdtrainError
from kdtrain.models.heads import check_model, decoder_layers, head_of, hidden_states
from tests.language.conftest import FAMILIES, VOCABULARY, tiny

PLACES = torch.cat([torch.arange(5), torch.arange(8), torch.arange(4)])[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(VOCABULARY, (2, 17))
    with torch.no_grad():
        hidden, _ = hidden_states(model, ids, torch.arange(17).expand(2, -1))
        logits = model(input_ids=ids, use_cache=False).logits
        made = head_of(model).logits(hidden)
    torch.testing.assert_close(made, logits, rtol=1e-5, atol=1e-5)
    assert float(logits.std()) > 0.05, "logits that hardly differ would prove nothing"
    check_model(model, "student", packing=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_alone(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(VOCABULARY, (1, 17))
    with torch.no_grad():
        packed, _ = hidden_states(model, ids, PLACES)
        for first, last in ((0, 5), (5, 13), (13, 17)):
            alone, _ = hidden_states(model, ids[:, first:last], PLACES[:, first:last])
            torch.testing.assert_close(packed[:, first:last], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_models_hidden_states(family: str) -> None:
    """The last layer is left out of the comparison: transformers hands it out behind the final norm."""
    model = tiny(family)
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        _, layers = hidden_states(model, ids, torch.arange(9).expand(2, -1), (1, 2, 1))
        known = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(layers) == 3 and len(decoder_layers(model)) == 2
    torch.testing.assert_close(layers[0], known[1])
    assert torch.equal(layers[2], layers[0]) and layers[1].shape == layers[0].shape


def test_leaking_rows_are_refused() -> None:
    shape = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    mamba = MambaForCausalLM(shape).eval()
    with pytest.raises(
        KdtrainError, match=r"lets documents that share a row see each other; set data.packing: false"
    ):
        check_model(mamba, "student", packing=True)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(KdtrainError, match=r"the teacher \(BloomForCausalLM\) lets documents"):
        check_model(bloom, "teacher", packing=True)
    check_model(bloom, "teacher", packing=False)


def test_a_head_with_an_unknown_step_is_refused() -> None:
    class Sharpened(type(tiny("llama"))):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = 2 * output.logits
            return output

    model = Sharpened(FAMILIES["llama"]()).eval()
    with pytest.raises(
        KdtrainError, match=r"the head of the student \(Sharpened\) does not give its own logits"
    ):
        check_model(model, "student", packing=False)


@pytest.mark.parametrize(
    "shape",
    [
        RecurrentGemmaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, lru_width=32, logits_soft_cap=3.0,
        ),
        Llama4TextConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=2, attention_chunk_size=8,
        ),
    ],
    ids=["recurrent_gemma", "llama4"],
)  # fmt: skip
def test_families_with_other_names_for_cap_and_body(shape: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape).eval()
    ids = torch.randint(VOCABULARY, (2, 17))
    with torch.no_grad():
        head_of(model).weight.mul_(10)
        hidden, _ = hidden_states(model, ids, torch.arange(17).expand(2, -1))
        logits = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(head_of(model).logits(hidden), logits, rtol=1e-5, atol=1e-5)
    check_model(model, "student", packing=False)
