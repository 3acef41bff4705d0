"""What a server can be wrong in: one error each, before anything is written, with the URL and the flag or field that mends it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.cli import main
from kdtrain.doctor.code_lm import examine_language
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.recipe import LanguageRecipe, save_recipe
from kdtrain.run import run
from kdtrain.teacher_cache.server.connection import API_KEY
from tests.language.conftest import opened, tiny
from tests.server.conftest import Start, served

POOLER = r"--runner pooling --pooler-config '\{\"task\":\"token_embed\",\"use_activation\":false\}'"


def on(path: str, fault: str) -> Callable[[int, str], str | None]:
    return lambda number, asked: fault if asked == path else None


TOP_K = {"targets": "topk", "top_k": 9}
CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"pooling": False}, {}, rf"URL has no /pooling: it was started to generate text; start it with {POOLER}"),
    ({}, {"targets": "topk"}, r"URL generates no text.*start it without --runner pooling"),
    ({"normalized": True}, {}, rf"URL normalises its states; start it with {POOLER}"),
    ({"dtype": torch.bfloat16}, {}, r"URL computes in bfloat16, but teacher.precision is fp32; start it with --dtype float32, or set teacher.precision: bf16"),
    ({}, {"precision": "bf16"}, r"URL computes in float32, but teacher.precision is bf16; start it with --dtype bfloat16, or set teacher.precision: fp32"),
    ({"max_length": 40}, {}, r"a piece of 64 tokens is longer than the 40 that tiny at URL answers; lower data.max_length, or start .* --max-model-len"),
    ({"max_length": 64, "pooling": False}, TOP_K, r"longer than the 63 that tiny at URL answers"),
    ({"max_logprobs": 20, "pooling": False}, {"targets": "topk"}, r"URL refuses teacher.top_k: .*max allowed: 20.*start the server with a larger --max-logprobs"),
    ({}, {"served_name": "large"}, r"URL serves tiny and not large; set teacher.served_name"),
    ({"fault": on("/pooling", "short")}, {}, r"URL/pooling answered \d+ states for \d+ tokens; .*chunked prefill \(--no-enable-chunked-prefill\)"),
    ({"fault": on("/pooling", "nan")}, {}, r"URL/pooling answered states that are NaN or infinite; start the server with --dtype"),
    ({"fault": on("/v1/completions", "nan"), "pooling": False}, TOP_K, r"URL/v1/completions answered log-probabilities that are NaN"),
    ({"fault": on("/v1/completions", "logits"), "pooling": False}, TOP_K, r"URL/v1/completions answered values that are not log-probabilities; .*--logprobs-mode raw_logprobs"),
    ({"fault": on("/v1/completions", "swapped"), "pooling": False}, TOP_K, r"URL/v1/completions answered .* or about other tokens; name the server itself in teacher.url"),
    ({"fault": on("/v1/models", "500")}, {}, r"URL did not answer for 1 s: /v1/models answered 500 .*correct teacher.url"),
    ({"fault": on("/v1/models", "html")}, {}, r"URL did not answer for 1 s: /v1/models answered something that is not JSON; .*teacher.url"),
    ({"key": "open sesame"}, {}, rf"URL refuses the request \(401\); set the environment variable {API_KEY}"),
]  # fmt: skip


@pytest.mark.parametrize(("server", "section", "sentence"), CASES)
def test_what_a_server_is_wrong_in(
    distillation: LanguageRecipe,
    start: Start,
    tmp_path: Path,
    server: dict[str, Any],
    section: dict[str, Any],
    sentence: str,
) -> None:
    _, url = start(**server)
    recipe = served(distillation, tmp_path / "run", url, **section)
    with pytest.raises(KdtrainError, match=sentence.replace("URL", url)) as caught:
        run(recipe)
    assert not (tmp_path / "run").exists() and "sesame" not in str(caught.value)
    (finding, *_) = examine_language(recipe)
    assert finding.level == "error" and finding.text == str(caught.value)


def test_another_model_is_told_by_width_tokens_and_log_probabilities(
    distillation: LanguageRecipe, start: Start, language_teacher: Path, tmp_path: Path
) -> None:
    _, wide = start(model=tiny("llama", hidden_size=64))
    with pytest.raises(
        KdtrainError, match=rf"{wide} answers states of width 64, the head at teacher.path is 32 wide"
    ):
        run(served(distillation, tmp_path / "run", wide))
    words = AutoTokenizer.from_pretrained(language_teacher)
    words.add_tokens(["return"])
    _, cut = start(words=words)
    with pytest.raises(
        KdtrainError,
        match=rf"the tokenizer of {cut} differs from the one of teacher.path: token \d+ of a sample",
    ):
        run(served(distillation, tmp_path / "run", cut))
    _, pooling = start()
    _, same = start(pooling=False)
    findings = [one.text for one in examine_language(served(distillation, tmp_path, f"{pooling},{same}"))]
    assert any(f"log-probabilities of 24 tokens equal those of {same}" in text for text in findings)
    _, other = start(pooling=False, model=tiny("llama", seed=3, vocab_size=286))
    with pytest.raises(
        KdtrainError, match=rf"makes other log-probabilities of the states of {pooling} than {other} answers"
    ):
        run(served(distillation, tmp_path / "run", f"{pooling},{other}"))


def test_another_body_does_not_go_on_with_a_store(
    distillation: LanguageRecipe,
    start: Start,
    language_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same head, configuration and name: stored segments are asked again before others are stored beside them."""
    _, url = start()
    changed = AutoModelForCausalLM.from_pretrained(language_teacher).eval()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    _, other = start(model=changed)
    recipe = served(distillation, tmp_path / "run", None, signal="hidden", cache=str(tmp_path / "cache"))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = ["cache", str(tmp_path / "recipe.yaml"), "--teacher.url"]
    assert main([*command, url]) == 0
    shorter = ["--data.max_length", "48"]
    capsys.readouterr()
    assert main([*command, other, *shorter]) == 2
    assert "the stored hidden differ from the recomputed ones by" in capsys.readouterr().err
    assert main([*command, url, *shorter]) == 0


def test_fields_that_do_not_belong_together(distillation: LanguageRecipe) -> None:
    for changes, sentence in (
        ({"source": "local", "url": "http://127.0.0.1:1"}, r"teacher.url does nothing with teacher.source local; set teacher.source: server"),
        ({"source": "server", "signal": "shards"}, r"asks no server; set teacher.source: local"),
        ({"source": "server", "signal": "hidden", "targets": "topk"}, r"teacher.targets topk is for teacher.signal online"),
    ):  # fmt: skip
        with pytest.raises(KdtrainError, match=sentence):
            distillation.teacher.replaced(**changes)
    with pytest.raises(KdtrainError, match=r"inner layers of the teacher, which a server does not answer"):
        unserved = distillation.teacher.replaced(source="server", url="http://127.0.0.1:1")
        opened(distillation.replaced(teacher=unserved, method=method_options("kd_features")))
    with pytest.raises(KdtrainError, match=r"teacher.url names no server; give the address of one"):
        run(distillation.replaced(teacher=distillation.teacher.replaced(source="server"), output="/nowhere"))


def test_a_key_is_in_no_file_and_no_message(
    distillation: LanguageRecipe,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, url = start(key="open sesame")
    monkeypatch.setenv(API_KEY, "open sesame")
    run(served(distillation, tmp_path / "run", url))
    said = capsys.readouterr()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(b"sesame" in path.read_bytes() for path in files)
    assert "sesame" not in said.out + said.err
    with pytest.raises(KdtrainError, match=r"without credentials .*got one for host") as caught:
        run(served(distillation, tmp_path / "other", "http://user:sesame@host:1"))
    assert "sesame" not in str(caught.value)
