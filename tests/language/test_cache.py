"""Stored teacher signals: hidden states and cross-terms train as the teacher itself does, the likeliest tokens as they should."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.cli import main
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.files import writing
from kdtrain.models.heads import head_of
from kdtrain.recipe import save_recipe
from kdtrain.run import run
from kdtrain.tasks.code_lm.recipe import LanguageMethodRecipe, LanguageRecipe, LanguageStudentRecipe
from kdtrain.tasks.code_lm.task import CodeLM
from tests.language.conftest import opened


@pytest.fixture(scope="module")
def recipe(language_distillation: LanguageRecipe, tmp_path_factory: pytest.TempPathFactory) -> LanguageRecipe:
    """A short distillation of distributions."""
    return replace(
        language_distillation,
        method=LanguageMethodRecipe(temperature=2.0),
        training=replace(language_distillation.training, max_steps=4, evaluate_every=4, log_every=1),
        output=str(tmp_path_factory.mktemp("cached") / "online"),
    )


def stored(recipe: LanguageRecipe, folder: Path, signal: str, **options: object) -> LanguageRecipe:
    return replace(
        recipe,
        teacher=replace(
            recipe.teacher, signal=signal, dtype="float32", cache=str(folder / "cache"), **options
        ),
        output=str(folder / "run"),
    )


def losses(folder: Path) -> list[float]:
    return [
        value
        for line in read_metrics(folder)
        for name, value in line.items()
        if name in ("loss", "valid/loss")
    ]


def test_hidden_states_and_all_tokens_equal_the_online_teacher(
    recipe: LanguageRecipe, tmp_path: Path
) -> None:
    """Hidden states in float32 are exact; the likeliest tokens are when all of the vocabulary is kept."""
    run(recipe)
    wanted = losses(Path(recipe.output))
    for signal, options in (("hidden", {}), ("topk", {"top_k": 286, "tail": "renormalize"})):
        found = stored(recipe, tmp_path / signal, signal, **options)
        run(found)
        assert losses(tmp_path / signal / "run") == pytest.approx(wanted, rel=1e-5)
    manifest = json.loads((tmp_path / "topk" / "cache" / "topk" / "manifest.json").read_text())
    assert manifest["covered_probability"] == pytest.approx(1.0, abs=1e-6)


def test_signals_equal_a_teacher_with_more_rows(recipe: LanguageRecipe, tmp_path: Path) -> None:
    """The teacher's head has rows that the student's lacks: what is stored is over the tokens of both.

    The head stays as it was, so a cross-term says all that forward KL needs.
    """
    given = str(recipe.teacher.path)
    tokenizer = AutoTokenizer.from_pretrained(given)
    model = AutoModelForCausalLM.from_pretrained(given)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    padded = replace(
        recipe,
        student=replace(recipe.student, tokenizer=given, frozen_head=True),
        teacher=replace(recipe.teacher, path=str(tmp_path / "padded")),
        output=str(tmp_path / "online"),
    )
    run(padded)
    wanted = losses(tmp_path / "online")
    for signal, options in (("cross_term", {}), ("topk", {"top_k": 286, "tail": "renormalize"})):
        run(stored(padded, tmp_path / signal, signal, **options))
        assert losses(tmp_path / signal / "run") == pytest.approx(wanted, rel=1e-5), signal
    started = head_of(CodeLM(padded).student).weight
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "cross_term" / "run" / "student")
    assert torch.equal(head_of(trained).weight, started), "the head is as it was"
    manifest = json.loads((tmp_path / "cross_term" / "cache" / "cross_term" / "manifest.json").read_text())
    assert (manifest["vocabulary"], manifest["temperature"]) == (286, 2.0)

    more = LanguageStudentRecipe(path=str(tmp_path / "padded"), frozen_head=True)
    with pytest.raises(
        KdtrainError, match="the student's head has 300 rows, of which the teacher shares 286;"
    ):
        opened(stored(replace(recipe, student=more), tmp_path / "more", "cross_term"))


def test_cross_term_states_its_cost_and_its_conditions(
    recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stored(recipe, tmp_path, "cross_term")
    found = replace(found, student=replace(found.student, frozen_head=True))
    save_recipe(found, tmp_path / "recipe.yaml")
    command = ["cache", str(tmp_path / "recipe.yaml")]
    assert main([*command, "--verify"]) == 0
    said = capsys.readouterr().err
    assert "tokens x 72 bytes (16 numbers for the student's frozen head, its bias and an entropy) = " in said
    assert said.count("recomputed rows agree") == 2
    for options, sentence in (
        (["--student.frozen_head", "false"], "which training would change; set student.frozen_head: true"),
        (["--seed", "1"], "the frozen head of the student (student.path, training.precision) is"),
        (
            ["--method.temperature", "3"],
            "the temperature that the cross-term is for (method.temperature) is 2.0",
        ),
        (["--method.divergence", "jsd"], "stands for forward_kl only, got method.divergence jsd"),
        (
            ["--method.last_temperature", "1"],
            "method.last_temperature changes it; set teacher.signal: hidden",
        ),
    ):
        assert main([*command, *options]) == 2
        assert sentence in capsys.readouterr().err, options
    with pytest.raises(KdtrainError, match=r"set student.frozen_head: true \(or student.lora_rank\)"):
        run(stored(recipe, tmp_path, "cross_term"))
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_second_writer_is_refused(recipe: LanguageRecipe, tmp_path: Path) -> None:
    """While another process holds the folder, nothing is written; what it left is used afterwards."""
    found = stored(recipe, tmp_path, "hidden")
    parts = opened(found)
    with (
        writing(tmp_path / "cache" / "hidden", "the teacher cache", "teacher.cache"),
        pytest.raises(KdtrainError, match=r"another run \(process \d+\) is writing the teacher cache"),
    ):
        parts.stored_signals(torch.device("cpu"))
    assert not list(tmp_path.rglob("shard-*"))
    parts.stored_signals(torch.device("cpu"))


def test_command_states_the_cost_and_verifies(
    recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stored(recipe, tmp_path, "topk", top_k=8)
    save_recipe(found, tmp_path / "recipe.yaml")
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify"]) == 0
    said = capsys.readouterr().err
    assert "tokens x 64 bytes (8 tokens with their log-probabilities) = " in said
    assert "the 8 kept tokens hold " in said and "recomputed rows agree" in said
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--teacher.top_k", "9"]) == 2
    assert (
        "the tokens kept of each distribution (teacher.top_k) is 8 there and 9 here"
        in capsys.readouterr().err
    )
    run(found)
    assert "teacher cache: " not in capsys.readouterr().err, "nothing was computed twice"
    (tmp_path / "cache" / "topk" / "manifest.json").unlink()
    assert main(["cache", str(tmp_path / "recipe.yaml")]) == 2
    assert "has no manifest.json, so nothing says whose outputs these are" in capsys.readouterr().err


def test_stored_rows_are_the_teachers(recipe: LanguageRecipe, tmp_path: Path) -> None:
    """Kept tokens are the likeliest of the row they are read for, and a damaged file is told."""
    found = stored(recipe, tmp_path, "topk", top_k=5)
    parts = opened(found)
    rows, _ = parts.stored_signals(torch.device("cpu"))
    index = torch.tensor([2, 0])
    batch = rows.batch(index, torch.device("cpu"))
    assert parts.teacher is not None
    outputs = batch.stored["teacher"]
    hidden, _ = parts.teacher.hidden(batch.input_ids, batch.positions)
    log_p = parts.teacher.head.logits(hidden).log_softmax(-1)
    inside = torch.arange(hidden.shape[1]) < rows.lengths[index][:, None]
    torch.testing.assert_close(
        outputs["logprobs"][inside], log_p.topk(5).values[inside], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        log_p.gather(-1, outputs["indices"])[inside], outputs["logprobs"][inside], rtol=1e-4, atol=1e-4
    )
    path = next((tmp_path / "cache" / "topk").glob("shard-*"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(KdtrainError, match=r"is damaged .*; delete this one file and it is computed again"):
        parts.stored_signals(torch.device("cpu"))


def test_reverse_kl_is_refused_where_tokens_that_were_not_kept_have_no_probability(
    language_distillation: LanguageRecipe,
) -> None:
    """In the recipe: the loss would refuse it only after the whole cache was built."""
    for signal in ("topk", "shards"):
        with pytest.raises(KdtrainError, match=r"reverse_kl is infinite .* set teacher.tail: bucket"):
            replace(
                language_distillation,
                teacher=replace(language_distillation.teacher, signal=signal, tail="renormalize"),
                method=LanguageMethodRecipe(divergence="reverse_kl"),
            )
