"""A served teacher over real HTTP: what comes back is the model's own, and every failure is one sentence."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdtrain.errors import KdtrainError
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.teacher_cache.server.answers import covered_probability
from kdtrain.teacher_cache.server.connection import API_KEY
from kdtrain.teacher_cache.server.servers import TeacherServers
from tests.support.model_server import ServedTeacher, serving

PIECES = [[5, 9, 2, 77, 31], [8], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [250, 1, 17]]
RECORDED = json.loads((Path(__file__).parents[1] / "support" / "recorded_vllm.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 20, vocab_size=300, max_length=64)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def served(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Callable[..., tuple[ServedTeacher, str]]]:
    with ExitStack() as stack:

        def start(**options: Any) -> tuple[ServedTeacher, str]:
            teacher = ServedTeacher(model, tokenizer, **options)
            return teacher, stack.enter_context(serving(teacher))

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[..., TeacherServers]]:
    with ExitStack() as stack:
        yield lambda *urls, **options: stack.enter_context(TeacherServers(*urls, **options))


def own_hidden(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


Served = Callable[..., tuple[ServedTeacher, str]]
Connect = Callable[..., TeacherServers]


def test_hidden_states_are_the_models_own(served: Served, model: LlamaForCausalLM, connect: Connect) -> None:
    _, url = served()
    servers = connect([url])
    assert servers.model.name == "tiny" and servers.model.max_length == 512
    for ids, found in zip(PIECES, servers.hidden(PIECES, dtype="float32"), strict=True):
        assert torch.equal(found, own_hidden(model, ids))
    for ids, found in zip(PIECES, servers.hidden(PIECES, dtype="bfloat16"), strict=True):
        assert torch.equal(found, own_hidden(model, ids).bfloat16())


def test_top_k_is_the_models_own_after_every_token(
    served: Served, model: LlamaForCausalLM, connect: Connect
) -> None:
    _, url = served(pooling=False)
    for ids, (logprobs, indices) in zip(PIECES, connect([url]).top_k(PIECES, 7), strict=True):
        with torch.no_grad():
            table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        values, places = table.topk(7)
        assert torch.equal(indices, places)
        assert torch.equal(logprobs, values)
        assert covered_probability(logprobs) == pytest.approx(float(values.exp().sum(-1).mean()))


def test_the_reference_server_keeps_the_form_of_vllm(served: Served) -> None:
    teacher, url = served(pooling=False)
    _, pooling = served()
    body = {"model": "tiny", "prompt": PIECES[0], "max_tokens": 1, "prompt_logprobs": 3, "logprobs": 3}
    ours = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    real = RECORDED["completion"]["choices"][0]
    assert ours["prompt_logprobs"][0] is real["prompt_logprobs"][0] is None
    for entry in (ours["prompt_logprobs"][1], real["prompt_logprobs"][1]):
        assert all(
            key.isdecimal() and set(one) == {"logprob", "rank", "decoded_token"} for key, one in entry.items()
        )
        ranks = sorted(one["rank"] for one in entry.values())
        assert ranks[:3] == [1, 2, 3] and len(ranks) <= 4
    real_generated = RECORDED["logprobs_of_generated_text"]
    assert set(ours["logprobs"]) == set(real_generated)
    for entry in (ours["logprobs"]["top_logprobs"][0], real_generated["top_logprobs"][1]):
        assert all(key.startswith("token_id:") and isinstance(value, float) for key, value in entry.items())
    body = {"model": "tiny", "input": [PIECES[0]], "encoding_format": "bytes", "embed_dtype": "float16"}
    header = json.loads(httpx.post(f"{pooling}/pooling", json=body).headers["metadata"])
    assert set(header) == set(RECORDED["pooling_metadata"])
    assert set(header["data"][0]) == set(RECORDED["pooling_metadata"]["data"][0])
    teacher.max_logprobs = 100
    refused = httpx.post(
        f"{url}/v1/completions", json={"model": "tiny", "prompt": [1], "prompt_logprobs": 1000, "logprobs": 1}
    )
    assert refused.json()["error"]["message"] == RECORDED["refusals"]["max_logprobs"]


def test_several_servers_share_the_requests(
    served: Served, model: LlamaForCausalLM, connect: Connect
) -> None:
    first, first_url = served()
    second, second_url = served()
    pieces = [[i, i + 1, i + 2] for i in range(40)]
    for ids, found in zip(pieces, connect([first_url, second_url], in_flight=2).hidden(pieces), strict=True):
        assert torch.equal(found, own_hidden(model, ids).bfloat16())
    counts = [sum(path == "/pooling" for path in teacher.requests) for teacher in (first, second)]
    assert sum(counts) == 40 and min(counts) > 5


def test_answers_that_arrive_in_another_order(
    served: Served, model: LlamaForCausalLM, connect: Connect
) -> None:
    _, url = served(fault=lambda number, path: "slow" if number == 2 else None)
    for ids, found in zip(PIECES, connect([url]).hidden(PIECES, dtype="float32"), strict=True):
        assert torch.equal(found, own_hidden(model, ids))


def test_requests_stay_within_a_bound_of_the_reader(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, url = served()
    taken = []

    def pieces() -> Iterator[list[int]]:
        for i in range(50):
            taken.append(i)
            yield [i, i + 1]

    monkeypatch.setattr("kdtrain.teacher_cache.server.servers.AHEAD_TOKENS", 8)
    answers = connect([url], in_flight=2).hidden(pieces())
    next(answers)
    time.sleep(0.3)
    assert len(taken) == 6, "one is read, four of two tokens fit in the bound, and one waits for room"
    answers.close()
    assert teacher.requests.count("/pooling") <= 5


@pytest.mark.parametrize("fault", ["close", "500", "429", "cut", "html"])
def test_failures_that_pass_are_asked_again(
    served: Served, model: LlamaForCausalLM, fault: str, connect: Connect
) -> None:
    # Two of three requests fail: a connection that closes, an overloaded server, a body cut short, a proxy's page.
    _, url = served(
        pooling=False, fault=lambda number, path: fault if path == "/v1/completions" and number % 3 else None
    )
    servers = connect([url], in_flight=1)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0].topk(4).indices for ids in PIECES]
    found = [indices for _, indices in servers.top_k(PIECES, 4)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert servers.traffic.retries >= 4


def test_a_cut_body_of_states_is_asked_again(
    served: Served, model: LlamaForCausalLM, connect: Connect
) -> None:
    _, url = served(fault=lambda number, path: "cut" if number == 2 else None)
    (found,) = connect([url]).hidden([PIECES[0]])
    assert torch.equal(found, own_hidden(model, PIECES[0]).bfloat16())


def test_a_restarted_server_is_found_again(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, connect: Connect
) -> None:
    teacher = ServedTeacher(model, tokenizer)
    with serving(teacher) as url:
        servers = connect([url], in_flight=1)
        answers = servers.hidden(iter(PIECES))
        next(answers)
    port = int(url.rpartition(":")[2])
    with serving(teacher, port):
        assert len(list(answers)) == len(PIECES) - 1


REFUSALS: list[tuple[dict[str, Any], Callable[[TeacherServers], object], str]] = [
    ({"pooling": False}, lambda s: list(s.hidden(PIECES)), "start it with --runner pooling --pooler-config"),
    (
        {"max_logprobs": 3, "pooling": False},
        lambda s: list(s.top_k(PIECES, 4)),
        "start the server with a larger --max-logprobs",
    ),
    ({"max_length": 8}, lambda s: list(s.hidden(PIECES)), "a piece of 11 tokens is longer than the 8"),
    (
        {"fault": lambda n, path: "nan" if n > 1 else None},
        lambda s: list(s.hidden(PIECES)),
        "states that are NaN or infinite",
    ),
    (
        {"fault": lambda n, path: "short" if n > 1 else None},
        lambda s: list(s.hidden(PIECES)),
        "answered 4 states for 5 tokens",
    ),
    (
        {"fault": lambda n, path: "nan" if n > 1 else None, "pooling": False},
        lambda s: list(s.top_k(PIECES, 4)),
        "log-probabilities that are NaN or infinite",
    ),
    (
        {"fault": lambda n, path: "short" if n > 1 else None, "pooling": False},
        lambda s: list(s.top_k(PIECES, 4)),
        "answered 4 distributions for 5 tokens",
    ),
]


@pytest.mark.parametrize(("options", "ask", "sentence"), REFUSALS)
def test_answers_that_cannot_be_used(
    served: Served,
    options: dict[str, Any],
    ask: Callable[[TeacherServers], object],
    sentence: str,
    connect: Connect,
) -> None:
    _, url = served(**options)
    with pytest.raises(KdtrainError) as caught:
        ask(connect([url], patience=1.0))
    assert sentence in str(caught.value)
    assert url in str(caught.value) or "piece" in str(caught.value)


def test_no_server(tmp_path: Path, connect: Connect) -> None:
    with pytest.raises(
        KdtrainError,
        match=r"http://127\.0\.0\.1:9 did not answer for 1 s: nothing listens there .*; start the server, or correct teacher.url",
    ):
        connect(["http://127.0.0.1:9"])


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://user:secret@host", "", "http://a/?key=1"]
)
def test_addresses_that_are_none(url: str, connect: Connect) -> None:
    with pytest.raises(
        KdtrainError, match=r"teacher.url must look like http://127.0.0.1:8000, without credentials"
    ):
        connect([url])


def test_another_model_and_models_that_differ(served: Served, connect: Connect) -> None:
    _, url = served()
    _, other = served(name="other")
    with pytest.raises(KdtrainError, match=r"serves tiny and not large; set teacher.served_name"):
        connect([url], model="large")
    with pytest.raises(KdtrainError, match=r"serve different models .*tiny.*other"):
        connect([url, other])


def test_the_key_comes_from_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch, connect: Connect
) -> None:
    _, url = served(key="open sesame")
    with pytest.raises(KdtrainError, match=f"set the environment variable {API_KEY}") as caught:
        connect([url])
    monkeypatch.setenv(API_KEY, "open sesame")
    assert connect([url]).model.name == "tiny"
    assert "sesame" not in str(caught.value)


def test_a_slow_server_ends_with_a_sentence(served: Served, connect: Connect) -> None:
    _, url = served(fault=lambda number, path: "slow" if number > 1 else None)
    servers = connect([url], timeout=0.2, patience=0.6)
    with pytest.raises(
        KdtrainError,
        match=r"did not answer for 1 s: /pooling took longer than 0.2 s; look at the server, or name another one in teacher.url; the same",
    ):
        list(servers.hidden(PIECES))


def test_tokenizers_are_compared(
    served: Served, tokenizer: PreTrainedTokenizerFast, connect: Connect
) -> None:
    _, url = served()
    servers = connect([url])
    text = "def f(x): return x"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    servers.check_tokens(text, ids)
    with pytest.raises(KdtrainError, match=r"token 2 of a sample is \d+ there and 999 here"):
        servers.check_tokens(text, [*ids[:2], 999, *ids[3:]])
    with pytest.raises(
        KdtrainError, match=rf"token {len(ids) - 1} of a sample is {ids[-1]} there and nothing here"
    ):
        servers.check_tokens(text, ids[:-1])
