"""The BiGRU student: a transformers model in every respect that matters."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from kdtrain.models.bigru import BiGRUForSequenceClassification
from kdtrain.models.bigru_config import BiGRUConfig
from kdtrain.models.bigru_steps import PackedSteps, bigru_layer
from kdtrain.models.loading import parameter_count


@pytest.fixture
def model() -> BiGRUForSequenceClassification:
    shape: dict[str, Any] = {"vocab_size": 60, "hidden_size": 12, "num_hidden_layers": 2, "num_labels": 4}
    config = BiGRUConfig(**shape, max_position_embeddings=32)
    return BiGRUForSequenceClassification(config).eval()


def test_save_and_load_in_a_fresh_process(tmp_path: Path, model: BiGRUForSequenceClassification) -> None:
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    ids = torch.tensor([[0, 7, 9, 2]])
    code = (
        "import kdtrain, sys\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "import torch\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"print(Auto.from_pretrained({str(tmp_path)!r})(torch.tensor([[0, 7, 9, 2]])).logits.tolist())"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    torch.testing.assert_close(torch.tensor(eval(found.stdout)), model(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BiGRUConfig)
    assert AutoModel.from_pretrained(tmp_path).config.hidden_size == 12
    assert isinstance(
        AutoModelForSequenceClassification.from_pretrained(tmp_path), BiGRUForSequenceClassification
    )


def test_our_models_can_be_the_first_import() -> None:
    """transformers registers them while it loads; none may wait for another of ours then."""
    code = (
        "import kdtrain.models.bigru, kdtrain.models.pairs; print(kdtrain.models.bigru.BiGRUModel.__name__)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout == "BiGRUModel\n", found.stderr


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_read(model: BiGRUForSequenceClassification, side: str) -> None:
    rows = [[0, 5, 6, 7, 2], [0, 2], [0, 9, 2]]
    ids, mask = torch.full((3, 11), 1), torch.zeros(3, 11, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    padded = model(ids, mask)
    encoded = model.bigru(ids, mask)
    for i, row in enumerate(rows):
        alone = model.bigru(torch.tensor([row]))
        torch.testing.assert_close(padded.logits[i], model(torch.tensor([row])).logits[0])
        assert encoded.last_hidden_state is not None and alone.last_hidden_state is not None
        torch.testing.assert_close(encoded.last_hidden_state[i][mask[i] == 1], alone.last_hidden_state[0])
    ids[mask == 0] = 33  # whatever stands there
    assert torch.equal(model(ids, mask).logits, padded.logits)


def test_sentence_states_are_the_ends_of_every_layer(model: BiGRUForSequenceClassification) -> None:
    """Against one stacked torch.nn.GRU with the same weights."""
    bigru = model.bigru
    stacked = nn.GRU(12, 12, num_layers=2, batch_first=True, bidirectional=True)
    for i, layer in enumerate(bigru.layers):
        for name, parameter in layer.named_parameters():
            getattr(stacked, name.replace("_l0", f"_l{i}")).data.copy_(parameter.data)
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    embedded = bigru.norm(bigru.token_embeddings(ids) + bigru.position_embeddings(torch.arange(5)))
    hidden, last = stacked(embedded)
    states = model(ids).sentence_states
    assert states is not None
    torch.testing.assert_close(states[0], last.view(2, 2, 12).flatten(1))
    torch.testing.assert_close(states[0, 1], torch.cat([hidden[0, -1, :12], hidden[0, 0, 12:]]))


@pytest.mark.parametrize("autocast", [False, True])
def test_steps_of_the_cpu_are_those_of_torch(autocast: bool) -> None:
    """Values, sentence states and every gradient against nn.GRU, on rows of very different lengths in any order."""
    torch.manual_seed(4)
    layer = nn.GRU(10, 6, batch_first=True, bidirectional=True)
    lengths = torch.tensor([3, 9, 1, 9, 5])
    packed = pack_padded_sequence(torch.randn(5, 9, 10), lengths, batch_first=True, enforce_sorted=False)
    steps = PackedSteps.of(packed)
    weights = torch.randn(len(packed.data), 12), torch.randn(5, 12)
    found = []
    for ours in (False, True):
        layer.zero_grad()
        data = packed.data.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and ours):
            if ours:
                output = bigru_layer(layer, data, steps)
                ends = steps.ends(output)
            else:
                out, last = layer(packed._replace(data=data))
                output, ends = out.data, torch.cat([last[0], last[1]], dim=1)
        ((output * weights[0]).sum() + (ends * weights[1]).sum()).backward()
        grads = [
            data.grad,
            *(parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None),
        ]
        found.append([output.detach(), ends.detach(), *grads])
    assert found[1][0].dtype == torch.float32
    tolerance = 5e-2 if autocast else 1e-5
    for theirs, ours in zip(*found, strict=True):
        assert theirs is not None and ours is not None
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_training_and_evaluation_say_the_same(model: BiGRUForSequenceClassification) -> None:
    """Training takes the steps, evaluation nn.GRU; without dropout they agree."""
    ids = torch.randint(5, 50, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(11) < torch.tensor([11, 2, 6])[:, None]).long()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = model.eval()(ids, mask, output_hidden_states=True)
    trained = model.train()(ids, mask, output_hidden_states=True)
    model.eval()
    torch.testing.assert_close(trained.logits, given.logits)
    torch.testing.assert_close(trained.sentence_states, given.sentence_states)
    torch.testing.assert_close(trained.hidden_states, given.hidden_states)


@pytest.mark.parametrize(
    ("vocab", "width", "layers", "millions"),
    [
        (50_000, 768, 8, 122.6),
        (20_000, 448, 6, 30.5),
        (5_000, 320, 3, 7.1),
        (2_000, 176, 2, 1.5),
        (1_000, 112, 2, 0.6),
    ],
)
def test_sizes_of_the_study(vocab: int, width: int, layers: int, millions: float) -> None:
    """The five BiGRU students of arXiv 2508.15423 have the parameters that their names promise."""
    config = BiGRUConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers)
    with torch.device("meta"):
        model = BiGRUForSequenceClassification(config)
    assert round(parameter_count(model) / 1e6, 1) == pytest.approx(millions)
