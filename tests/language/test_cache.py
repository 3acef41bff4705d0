"""Stored teacher signals: hidden states and cross-terms train as the teacher itself does, the likeliest tokens as they should."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.cli import main
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.files import writing
from kdtrain.methods import method_options
from kdtrain.models.heads import head_of
from kdtrain.recipe import LanguageRecipe, LanguageStudentSection, save_recipe
from kdtrain.run import run
from kdtrain.tasks.code_lm.task import CodeLM
from kdtrain.tasks.code_lm.work import segments_of
from tests.language.conftest import opened
from tests.support.commands import torchrun


@pytest.fixture(scope="module")
def recipe(language_distillation: LanguageRecipe, tmp_path_factory: pytest.TempPathFactory) -> LanguageRecipe:
    """A short distillation of distributions."""
    return language_distillation.replaced(
        method=method_options("kd", ce_weight=0.5),
        training=language_distillation.training.replaced(max_steps=4, eval_steps=4, logging_steps=1),
        output=str(tmp_path_factory.mktemp("cached") / "online"),
    )


def stored(recipe: LanguageRecipe, folder: Path, signal: str, **options: object) -> LanguageRecipe:
    return recipe.replaced(
        teacher=recipe.teacher.replaced(
            signal=signal, dtype="float32", cache=str(folder / "cache"), **options
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
    recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hidden states in float32 are exact; the likeliest tokens are when all of the vocabulary is kept."""
    run(recipe)
    wanted = losses(Path(recipe.output))
    for signal, options in (("hidden", {}), ("topk", {"top_k": 286, "tail": "renormalize"})):
        found = stored(recipe, tmp_path / signal, signal, **options)
        run(found)
        assert losses(tmp_path / signal / "run") == pytest.approx(wanted, rel=1e-5)
    assert "the top 286 entries hold 100.00% of the probability" in capsys.readouterr().err


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
    padded = recipe.replaced(
        student=recipe.student.replaced(tokenizer=given, frozen_head=True),
        teacher=recipe.teacher.replaced(path=str(tmp_path / "padded")),
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

    more = LanguageStudentSection(path=str(tmp_path / "padded"), frozen_head=True)
    with pytest.raises(
        KdtrainError, match="the student's head has 300 rows, of which the teacher shares 286;"
    ):
        opened(stored(recipe.replaced(student=more), tmp_path / "more", "cross_term"))


def test_cross_term_states_its_cost_and_its_conditions(
    recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stored(recipe, tmp_path, "cross_term")
    found = found.replaced(student=found.student.replaced(frozen_head=True))
    save_recipe(found, tmp_path / "recipe.yaml")
    command = ["cache", str(tmp_path / "recipe.yaml")]
    assert main([*command, "--verify"]) == 0
    said = capsys.readouterr().err
    tokens = int(opened(found).rows[0].lengths.sum())
    assert f"(cross: {tokens} x 16 float32; bias, entropy: {tokens} float32), " in said
    assert said.count("recomputed rows agree") == 2
    for options, sentence in (
        (["--student.frozen_head", "false"], "which training would change; set student.frozen_head: true"),
        (["--seed", "1"], "the frozen head of the student (student.path, training.precision) is"),
        (
            ["--method.temperature", "3"],
            "the temperature of the cross-term (method.temperature) is 2.0",
        ),
        (["--method.divergence", "jsd"], "serves forward_kl only, got method.divergence jsd"),
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
        parts.stored_signals(Accelerator(cpu=True))
    assert not list(tmp_path.rglob("shard-*"))
    parts.stored_signals(Accelerator(cpu=True))


def test_command_states_the_cost_and_verifies(
    recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stored(recipe, tmp_path, "topk", top_k=8)
    save_recipe(found, tmp_path / "recipe.yaml")
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify"]) == 0
    said = capsys.readouterr().err
    tokens = int(opened(found).rows[0].lengths.sum())
    assert f"(logprobs: {tokens} x 8 float32; indices: {tokens} x 8 int32), " in said
    assert "the top 8 entries hold " in said and "recomputed rows agree" in said
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--teacher.top_k", "9"]) == 2
    assert (
        "the number of top-k entries of each distribution (teacher.top_k) is 8 there and 9 here"
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
    rows, _ = parts.stored_signals(Accelerator(cpu=True))
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
        parts.stored_signals(Accelerator(cpu=True))


def segments_stored(recipe: LanguageRecipe, capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """Segments of training documents in this recipe's rows, and how many of them had to be computed."""
    parts = opened(recipe)
    capsys.readouterr()
    rows, _ = parts.stored_signals(Accelerator(cpu=True))
    said = re.findall(r"teacher cache: (\d+) rows \(logprobs", capsys.readouterr().err)
    return len(set(rows.keys.tolist())), sum(map(int, said))


def test_what_stays_the_same_is_not_computed_again(
    recipe: LanguageRecipe, sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A document more, rows without packing, longer rows, another order: only segments that are new cost anything."""
    folder = tmp_path / "code"
    folder.mkdir()
    for number, source in enumerate(sources):
        (folder / f"file_{number:03d}.py").write_text(source)
    data = recipe.data.replaced(train=str(folder), suffixes=(".py",), max_length=48)
    found = stored(recipe, tmp_path, "topk", top_k=8).replaced(data=data)
    total, computed = segments_stored(found, capsys)
    assert total == computed > 40
    before = {path: path.read_bytes() for path in (tmp_path / "cache" / "topk").glob("shard-*")}
    assert segments_stored(found, capsys) == (total, 0)

    for name in ("alpha", "beta", "gamma", "delta"):  # held-out ones are stored elsewhere
        (folder / f"a_{name}.py").write_text(f"class {name}:\n    def {name}(self):\n        return 1\n")
    more, computed = segments_stored(found, capsys)
    assert 0 < computed == more - total
    assert segments_stored(found.replaced(data=data.replaced(packing=False)), capsys) == (more, 0)
    longer = found.replaced(data=data.replaced(max_length=64))
    assert segments_stored(longer, capsys)[1] == long_segments(longer, 48) > 0
    assert {path: path.read_bytes() for path in before} == before
    save_recipe(longer, tmp_path / "recipe.yaml")
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify", "--rows", "1000"]) == 0
    assert "recomputed rows agree" in capsys.readouterr().err


def long_segments(recipe: LanguageRecipe, length: int) -> int:
    """How many segments of more tokens there are."""
    segments, _ = segments_of(opened(recipe).rows[0])
    return int((segments.lengths > length).sum())


@pytest.mark.xdist_group("programs")
def test_two_processes_build_and_verify_one_cache(recipe: LanguageRecipe, tmp_path: Path) -> None:
    """`kdtrain cache` under torchrun: the cost is stated once, both write, and the result is what one process stores."""
    found = stored(recipe, tmp_path / "both", "hidden", batch_tokens=300)
    save_recipe(found, tmp_path / "recipe.yaml")
    program = torchrun(["kdtrain", "cache", str(tmp_path / "recipe.yaml"), "--verify"])
    _, errors = program.communicate()
    assert program.returncode == 0, errors[-3000:]
    assert errors.count("teacher cache: all checksums hold and") == 2
    assert len(re.findall(r"teacher cache: \d+ rows", errors)) == 2, errors
    folder = tmp_path / "both" / "cache" / "hidden"
    assert len(list(folder.glob("shard-*"))) == 4, "training and held-out rows, by two processes"
    alone = stored(recipe, tmp_path / "alone", "hidden")
    pairs = (opened(each).stored_signals(Accelerator(cpu=True)) for each in (alone, found))
    for one, two in zip(*pairs, strict=True):
        index = torch.arange(len(one.rows))
        batches = (rows.batch(index, torch.device("cpu")) for rows in (one, two))
        mine, theirs = (batch.stored["teacher"]["hidden"] for batch in batches)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(list(folder.glob("shard-*"))) == 4, "one process finds what two have stored"


def test_reverse_kl_is_refused_where_tokens_that_were_not_kept_have_no_probability(
    language_distillation: LanguageRecipe,
) -> None:
    """In the recipe: the loss would refuse it only after the whole cache was built."""
    for signal in ("topk", "shards"):
        with pytest.raises(KdtrainError, match=r"reverse_kl is infinite .* set teacher.tail: bucket"):
            language_distillation.replaced(
                teacher=language_distillation.teacher.replaced(signal=signal, tail="renormalize"),
                method=method_options("kd", temperature=1.0, divergence="reverse_kl"),
            )
