"""The whole path against a live vLLM server on loopback (`make test-server`): minutes, and a large download once.

The answers of the small server of the other tests are compared with recorded ones; here the recorded ones are compared with
those of the live server, so that the three cannot drift apart.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdtrain.cli import main
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.recipe import LanguageRecipe, save_recipe
from kdtrain.run import run
from kdtrain.teacher_cache.server.servers import TeacherServers
from kdtrain.teacher_cache.shard import map_file
from kdtrain.teacher_cache.store import shard_paths
from tests.server.conftest import served
from tests.server.test_served import contents, losses

pytestmark = pytest.mark.vllm

PYTHON = os.environ.get("KDTRAIN_VLLM_PYTHON", ".venv-server/bin/python")
RECORDED = json.loads((Path(__file__).parents[1] / "support" / "recorded_vllm.json").read_text())
POOLER = ("--runner", "pooling", "--convert", "embed")
POOLER += ("--pooler-config", '{"task":"token_embed","use_activation":false}')
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_SECONDS = 900


class LiveServer:
    """A vLLM server in a process of its own."""

    def __init__(self, model: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # `vllm serve` asks for a package of another name; the module does not.
        self.words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self.words += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        self.words += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", *flags]
        self.log = model.parent / f"server-{self.port}.log"
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.words, stdout=log, stderr=log, env={**os.environ, **QUIET}, start_new_session=True
            )

    def wait(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return self.url
            except httpx.TransportError:
                time.sleep(1.0)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of two layers and width 128."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = LlamaConfig(
        vocab_size=300,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        **shape,
        **ids,
    )
    folder = tmp_path_factory.mktemp("vllm") / "teacher"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def live(*servers: LiveServer) -> Iterator[list[str]]:
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(scope="module")
def urls(teacher: Path) -> Iterator[tuple[LiveServer, str]]:
    """A server of hidden states, and the address of one of log-probabilities."""
    pooling = LiveServer(teacher, *POOLER)
    with live(pooling, LiveServer(teacher, "--max-logprobs", "256")) as (_, generating):
        yield pooling, generating


@pytest.fixture
def recipe(language_recipe: LanguageRecipe, teacher: Path) -> LanguageRecipe:
    """Ten steps of distillation from it."""
    return language_recipe.replaced(
        student=language_recipe.student.replaced(tokenizer=None, hidden_size=16),
        teacher=language_recipe.teacher.replaced(path=str(teacher), batch_tokens=1),
        method=method_options("kd", temperature=2.0, ce_weight=0.5),
        training=language_recipe.training.replaced(max_steps=10, eval_steps=10, logging_steps=1),
    )


def test_the_store_and_ten_steps_equal_the_local_teacher(
    recipe: LanguageRecipe, urls: tuple[LiveServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pooling, generating = urls
    run(recipe.replaced(output=str(tmp_path / "online")))
    both = f"{pooling.url},{generating}"
    run(served(recipe, tmp_path / "asked", both, dtype="float32"))
    wanted = losses(tmp_path / "online")
    assert losses(tmp_path / "asked") == pytest.approx(wanted, rel=1e-4) and len(wanted) == 21
    run(served(recipe, tmp_path / "asked_topk", generating, targets="topk", top_k=256))
    for stored, url in (("hidden", both), ("topk", generating)):
        local = recipe.replaced(
            teacher=recipe.teacher.replaced(signal=stored, top_k=20),
            output=str(tmp_path / stored / "local"),
        )
        remote = served(local, tmp_path / stored / "served", url)
        for one in (local, remote):
            save_recipe(one, tmp_path / "recipe.yaml")
            assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify"]) == 0
        mine, theirs = (
            contents(tmp_path / stored / kind / "teacher_cache" / stored) for kind in ("served", "local")
        )
        assert mine.keys() == theirs.keys()
        name, dtype = {"hidden": ("hidden", torch.bfloat16), "topk": ("logprobs", torch.float32)}[stored]
        ours, others = (
            torch.frombuffer(bytearray(b"".join(found[key][name] for key in sorted(found))), dtype=dtype)
            for found in (mine, theirs)
        )
        # Another engine adds in another order, 4e-6 apart: now and then that ends on the other side of a rounding.
        torch.testing.assert_close(ours, others, rtol=2**-7 if stored == "hidden" else 1e-4, atol=1e-4)
        equal = float((ours == others).double().mean())
        worst = float((ours.float() - others.float()).abs().max())
        assert equal > 0.99 or stored == "topk"
        with capsys.disabled():
            print(
                f"\n{stored}: {equal:.2%} of {len(ours)} stored values equal the local teacher's to the bit, the others up to {worst:.1g} apart"
            )


def test_bytes_on_the_wire(
    recipe: LanguageRecipe, urls: tuple[LiveServer, str], teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = AutoTokenizer.from_pretrained(teacher)
    text = "".join(json.loads(line)["text"] for line in Path(recipe.data.train).read_text().splitlines())
    ids = 4 * words(text)["input_ids"]
    pieces = [ids[first : first + 256] for first in range(0, 4096, 256)]
    pooling, generating = urls
    rows = []
    for name in ("bfloat16", "float16", 20, 64, 256):
        with TeacherServers([pooling.url if isinstance(name, str) else generating]) as servers:
            _ = servers.pooling, servers.generating
            before, began = servers.traffic.received_bytes, time.monotonic()
            if isinstance(name, str):
                _ = list(servers.hidden(pieces, dtype=name))
            else:
                _ = list(servers.top_k(pieces, name))
            count = sum(map(len, pieces))
            rows.append(
                (name, (servers.traffic.received_bytes - before) / count, count / (time.monotonic() - began))
            )
    with capsys.disabled():
        print()
        for name, size, speed in rows:
            label = f"hidden {name}, width 128" if isinstance(name, str) else f"top {name}"
            print(f"{label}: {size:.0f} bytes a token, {speed:.0f} tokens/s")
    assert rows[0][1] == rows[1][1] == 256
    assert rows[2][1] < rows[3][1] < rows[4][1]


def test_recorded_answers_have_the_form_of_the_live_ones(urls: tuple[LiveServer, str]) -> None:
    pooling, generating = urls
    body = {"model": "tiny", "prompt": [5, 9, 2], "max_tokens": 1, "prompt_logprobs": 3, "logprobs": 3}
    body |= {"return_tokens_as_token_ids": True, "temperature": 0}
    answer = httpx.post(f"{generating}/v1/completions", json=body, timeout=60).json()
    assert set(RECORDED["completion"]) == set(answer)
    assert set(RECORDED["completion"]["choices"][0]) == set(answer["choices"][0])
    assert set(RECORDED["logprobs_of_generated_text"]) == set(answer["choices"][0]["logprobs"])
    body = {"model": "tiny", "input": [[5, 9, 2]], "encoding_format": "bytes", "embed_dtype": "float16"}
    header = json.loads(httpx.post(f"{pooling.url}/pooling", json=body, timeout=60).headers["metadata"])
    assert set(header) == set(RECORDED["pooling_metadata"])
    assert set(header["data"][0]) == set(RECORDED["pooling_metadata"]["data"][0])
    body = {"model": "tiny", "prompt": [1], "prompt_logprobs": 1000}
    refused = httpx.post(f"{generating}/v1/completions", json=body, timeout=60).json()["error"]["message"]
    assert refused.split(":")[0] == RECORDED["refusals"]["max_logprobs"].split(":")[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"served_name": "large"}, "serves tiny and not large; set teacher.served_name"),
        ({"precision": "bf16"}, "computes in float32, but teacher.precision is bf16; start it with --dtype bfloat16"),
        ({"targets": "topk", "top_k": 9}, "generates no text, so it answers no log-probabilities; start it without --runner pooling"),
    ],
)  # fmt: skip
def test_what_the_recipe_is_wrong_in(
    recipe: LanguageRecipe,
    urls: tuple[LiveServer, str],
    tmp_path: Path,
    changes: dict[str, str],
    sentence: str,
) -> None:
    with pytest.raises(KdtrainError, match=sentence):
        run(served(recipe, tmp_path / "run", urls[0].url, **changes))


def test_a_generator_a_long_row_and_too_many_entries(
    recipe: LanguageRecipe, urls: tuple[LiveServer, str], tmp_path: Path
) -> None:
    _, generating = urls
    with pytest.raises(KdtrainError, match="has no /pooling: it was started to generate text"):
        run(served(recipe, tmp_path / "run", generating))
    with TeacherServers([generating]) as servers, pytest.raises(KdtrainError, match="larger --max-logprobs"):
        servers.likeliest([5, 9], 257)
    with TeacherServers([generating]) as servers, pytest.raises(KdtrainError, match="larger --max-model-len"):
        servers.likeliest([5] * 512, 3)


def test_a_killed_server_comes_back(
    recipe: LanguageRecipe, urls: tuple[LiveServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a build: what was written stays, the same command continues by itself when the server is back."""
    pooling, _ = urls
    monkeypatch.setattr("kdtrain.teacher_cache.build.SHARD_ROWS", 4)
    monkeypatch.setattr("kdtrain.teacher_cache.server.connection.PATIENCE", float(START_SECONDS))
    one = served(recipe, tmp_path / "run", pooling.url, signal="hidden")
    save_recipe(one, tmp_path / "recipe.yaml")
    folder = tmp_path / "run" / "teacher_cache" / "hidden"

    def restart() -> None:
        while len(shard_paths(folder)) < 2:
            time.sleep(0.01)
        pooling.stop()
        pooling.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify"]) == 0
    thread.join()
    keys = [bytes(key.tolist()) for path in shard_paths(folder) for key in map_file(path, "")["keys"]]
    assert len(keys) == len(set(keys)) > 40
