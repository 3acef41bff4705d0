"""The masked-language-model stage: what is hidden, that pieces and kills change nothing, and the way to a teacher."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaForMaskedLM,
)

from kdtrain.cli import main
from kdtrain.data.handlers import HOLE, functions_with_names
from kdtrain.errors import KdtrainError
from kdtrain.methods import build_methods
from kdtrain.methods.base import Step
from kdtrain.methods.ft import FineTuning
from kdtrain.models.loading import Shape
from kdtrain.models.masked_heads import check_masked_head, masked_head
from kdtrain.models.students import roberta_config
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED
from kdtrain.recipe import MaskedDataSection, MaskedRecipe, StudentSection, save_recipe
from kdtrain.run import run
from kdtrain.summary import Summary
from kdtrain.tasks.masked_lm.corpus import Corpus, load_corpus
from kdtrain.tasks.masked_lm.outputs import MaskedModels
from kdtrain.tasks.masked_lm.rows import (
    MaskedBatch,
    MaskedRows,
    masked_count,
    masked_name_rows,
    text_rows,
)
from kdtrain.tasks.recipes import recipe_from_dict
from tests.support.commands import Program

CODE = (
    "def f(a):\n    try:\n        g(a)\n    except KeyError:\n        raise TypeError(a)\n    raise OSError\n"
)
SHAPE = StudentSection(vocab_size=400, hidden_size=32, layers=2, heads=2, intermediate_size=64, max_length=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 files of which a token follows from the ones before it."""
    folder = tmp_path_factory.mktemp("code")
    for n in range(90):
        lines = [f"def read_{n}_{i}(table, rows):\n    return table[rows[{i % 3}]]\n" for i in range(6)]
        (folder / f"m{n}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe(corpus: Path) -> MaskedRecipe:
    return MaskedRecipe.parse(
        {
            "task": "masked_lm",
            "data": {"train": [str(corpus)], "held_out": 0.1},
            "student": {"vocab_size": 400, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64,
                        "max_length": 64, "dropout": 0.3},
            "training": {"max_steps": 60, "batch_size": 16, "learning_rate": 3e-3, "eval_steps": 12},
        }
    )  # fmt: skip


def named_rows() -> tuple[MaskedRows, Any]:
    functions = functions_with_names(CODE.encode(), "m", raises=True)
    tokenizer = train_tokenizer([CODE] * 4, vocab_size=330, max_length=64, focus=HOLE)
    rows, names = masked_name_rows(functions, tokenizer, 64, HOLE)
    return MaskedRows.of(rows, names, tokenizer, HOLE), tokenizer


def test_names_are_hidden_and_masks_spare_special_tokens() -> None:
    rows, tokenizer = named_rows()
    assert len(rows) == 2, "the handler, and the first raise of the function"
    assert rows.names is not None
    pieces = [str(tokenizer.decode(name)).strip() for name in rows.names]
    assert "KeyError".startswith(pieces[0]) and "TypeError".startswith(pieces[1]) and all(pieces)
    both = torch.tensor([0, 1])
    ids, _ = rows.rows.batch(both)
    masked = rows.batch(both, CPU, step=1, whole=both)
    assert masked.is_name.sum(dim=1).tolist() == [2, 2], "the first token and the hole"
    special = torch.isin(ids, rows.special)
    assert torch.equal(masked.input_ids[special], ids[special])
    assert torch.equal(masked.labels[masked.is_name], rows.names.repeat_interleave(2))
    assert masked.token_weight is not None
    assert float(masked.token_weight[masked.is_name].sum()) == pytest.approx(rows.count(both)), "their mean"
    chosen = (masked.labels != IGNORED) & ~masked.is_name
    assert not (chosen & special).any()
    assert chosen.sum(dim=1).tolist() == masked_count(rows.free).tolist()
    assert int(chosen.sum()) == rows.count(torch.tensor([0, 1]))
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])


def test_of_the_chosen_most_are_masked_and_each_step_chooses_anew() -> None:
    tokenizer = train_tokenizer([CODE] * 4, vocab_size=330, max_length=64)
    rows = MaskedRows.of(text_rows([CODE] * 80, tokenizer, 64), None, tokenizer, None, 3)
    index = torch.arange(len(rows))
    ids, _ = rows.rows.batch(index)
    first, again, other = (rows.batch(index, CPU, step=step) for step in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids) and not torch.equal(first.labels, other.labels)
    chosen = first.labels != IGNORED
    share = (first.input_ids[chosen] == rows.masking.mask_id).double().mean()
    same = (first.input_ids[chosen] == ids[chosen]).double().mean()
    assert 0.72 < share < 0.88 and 0.04 < same < 0.18, "of some 800"
    assert masked_count(torch.tensor([0, 1, 3, 10, 100])).tolist() == [0, 1, 1, 2, 15]


def test_documents_follow_each_other_in_full_rows() -> None:
    tokenizer = train_tokenizer([CODE] * 4, vocab_size=330, max_length=64)
    rows = text_rows([CODE, "x = 1\n", CODE], tokenizer, 20)
    assert rows.lengths[:-1].unique().tolist() == [20]
    ids, mask = rows.batch(torch.arange(len(rows)))
    assert (ids[:, 0] == 0).all() and (ids[mask.bool()][-1] == 2)
    inner = [int(i) for row, length in zip(ids, rows.lengths, strict=True) for i in row[1 : length - 1]]
    expected = [
        i for text in (CODE, "x = 1\n", CODE) for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    ]  # fmt: skip
    assert inner == expected


def test_rows_of_empty_documents_are_left_out() -> None:
    """Nothing in them can be hidden, so a batch of theirs would have no mean."""
    tokenizer = train_tokenizer([CODE] * 4, vocab_size=330, max_length=64)
    rows = MaskedRows.of(text_rows([""] * 40 + [CODE], tokenizer, 20), None, tokenizer, None)
    assert len(text_rows([""] * 40, tokenizer, 20)) == 3
    assert (rows.free > 0).all()
    assert int(rows.free.sum()) == len(tokenizer(CODE, add_special_tokens=False)["input_ids"])
    corpus = Corpus([""] * 3, ["x"])
    with pytest.raises(KdtrainError, match=r"no token of 3 documents of data.train can be masked"):
        corpus.rows(corpus.train, tokenizer, 20, 0)


@pytest.mark.parametrize("kind", ["text", "names"])
def test_pieces_and_padding_do_not_change_the_step(kind: str) -> None:
    rows, tokenizer = named_rows()
    if kind == "text":
        rows = MaskedRows.of(text_rows([CODE] * 3, tokenizer, 20), None, tokenizer, None)
    torch.manual_seed(0)
    model = RobertaForMaskedLM(roberta_config(SHAPE.replaced(max_length=64, dropout=0.5), tokenizer))
    objective = objective_of(model).train()
    whole = torch.arange(min(5, len(rows)))
    found = []
    for splits in (1, 2, len(whole), len(whole) + 1):
        objective.zero_grad()
        batch = objective.prepare_step(objective, Step(4, 10), whole, rows, Accelerator(), splits)
        parts = [(*objective(micro_batch, batch.divisor), scale) for micro_batch, scale in batch]
        loss = torch.stack([loss * scale for loss, _, scale in parts]).sum()
        loss.backward()
        terms = sum(values["ce"] * (scale > 0) for _, values, scale in parts)
        grads = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
        found.append((loss.detach(), terms, grads))
    for loss, terms, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(terms, found[0][1])
        torch.testing.assert_close(grads, found[0][2], rtol=1e-4, atol=1e-6)


def objective_of(model: Any) -> Objective:
    """A masked language model that learns from labels."""
    return Objective(
        model, build_methods([FineTuning.Options()], "masked_lm", Shape(0, 0), {}), MaskedModels()
    )


def small_models(tokenizer: Any) -> list[Any]:
    """RoBERTa, ModernBERT, BERT, a decoder alone (EuroBERT), and DistilBERT, whose head is not known."""
    small: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2}
    small.update(num_attention_heads=2, intermediate_size=32, pad_token_id=1)
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    distil: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": 1}
    return [
        RobertaForMaskedLM(roberta_config(SHAPE.replaced(dropout=0.0), tokenizer)),
        ModernBertForMaskedLM(ModernBertConfig(**small, **special)),
        BertForMaskedLM(BertConfig(**small)),
        EuroBertForMaskedLM(EuroBertConfig(**small, num_key_value_heads=2)),
        DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), **distil)),
    ]


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("number", range(5))  # the families of `small_models`
def test_the_loss_is_the_models_own(number: int) -> None:
    """Loss, gradients of every weight and measures are those of the model with labels; names are weighed beside tokens."""
    tokenizer = train_tokenizer([CODE] * 4, vocab_size=330, max_length=64)
    torch.manual_seed(0)
    model = small_models(tokenizer)[number].eval()
    for weight in model.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))  # no bias is zero
    known = masked_head(model) is not None
    assert known == (number < 4)
    check_masked_head(model)
    ids, mask = torch.randint(5, 300, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    labels = torch.where((torch.rand(3, 12) < 0.4) & mask.bool(), ids, IGNORED)
    names = (torch.rand(3, 12) < 0.3) & (labels != IGNORED)
    objective = objective_of(model).train()
    batch = MaskedBatch(
        input_ids=ids,
        labels=labels,
        rows=torch.arange(3),
        attention_mask=mask,
        is_name=names,
        token_weight=torch.where(names, 0.7, 1.0),
    )
    count = int((labels != IGNORED).sum())

    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    own = objective(replace(batch, token_weight=None), count)[0]
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=0.0)

    logits = model(input_ids=ids, attention_mask=mask).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    weighed = (losses * torch.where(names, 0.7, 1.0)).sum() / count
    model.zero_grad()
    weighed.backward()
    gradients = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    loss, terms = objective(batch, count)
    loss.backward()
    torch.testing.assert_close(loss, weighed, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(terms["ce"] / count, weighed.detach(), rtol=1e-5, atol=0.0)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)

    right = logits.argmax(-1) == labels
    sides = [((labels != IGNORED) & ~names), names]
    expected_sums = [value for side in sides for value in (losses[side].sum(), right[side].sum(), side.sum())]
    sums = objective(run=lambda: objective.measure(batch))
    torch.testing.assert_close(
        sums.sum(0), torch.stack([one.double() for one in expected_sums]), rtol=1e-5, atol=0.0
    )


def test_a_head_that_is_more_than_it_looks_is_refused() -> None:
    """BART adds a bias after its head; trained without it, it would be another model."""
    small: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    small.update(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    model = BartForConditionalGeneration(BartConfig(**small))
    check_masked_head(model)
    model.final_logits_bias[0, 7] = 1.0
    with pytest.raises(
        KdtrainError, match="BartForConditionalGeneration does not give the model's own logits"
    ):
        check_masked_head(model)


def test_a_killed_stage_goes_on_bit_for_bit_and_its_encoder_becomes_a_teacher(
    recipe: MaskedRecipe, toy: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = run(recipe.replaced(output=str(whole)))
    assert summary.valid["loss"] < 0.65 * math.log(400), "it learned nothing"
    assert run(recipe.replaced(output=str(whole))) == summary

    save_recipe(recipe.replaced(output=str(killed)), tmp_path / "recipe.yaml")
    command = ["kdtrain", "train", str(tmp_path / "recipe.yaml")]
    process = Program(command)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.kill() == -signal.SIGKILL, "the run was over before it could be killed"
    again = Program(command)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "resumed at step" in errors
    for name in ("student/model.safetensors", "student/tokenizer.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name

    model = AutoModelForMaskedLM.from_pretrained(whole / "student")
    assert model.config.hidden_dropout_prob == 0.3, "kept for the fine-tuning"
    (tmp_path / "fine-tune.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "classification",
                "data": {"path": str(toy)},
                "method": {"name": "ft"},
                "student": {"path": str(whole / "student"), "max_length": 64},
                "training": {"max_steps": 4, "batch_size": 16},
                "output": str(tmp_path / "teacher"),
            }
        )
    )
    assert main(["train", str(tmp_path / "fine-tune.yaml")]) == 0
    assert Summary.load(tmp_path / "teacher").student["architecture"] == "roberta"
    encoder = load_file(whole / "student" / "model.safetensors")
    tuned = load_file(tmp_path / "teacher" / "student" / "model.safetensors")
    name = "roberta.encoder.layer.0.output.dense.weight"
    assert 0 < (encoder[name] - tuned[name]).abs().max() < 0.05, "it started from the encoder"


def test_it_goes_on_from_a_model_that_is_there(recipe: MaskedRecipe, tmp_path: Path) -> None:
    """A ModernBERT with a tokenizer of its own."""
    tokenizer = train_tokenizer([CODE] * 4, vocab_size=330, max_length=64)
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small.update(intermediate_size=32, pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0)
    config = ModernBertConfig(vocab_size=len(tokenizer), sep_token_id=2, max_position_embeddings=64, **small)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    student = StudentSection(path=str(tmp_path / "start"), max_length=64)
    training = recipe.training.replaced(max_steps=3)
    run(recipe.replaced(student=student, training=training, output=str(tmp_path / "run")))
    summary = Summary.load(tmp_path / "run")
    assert summary.student["architecture"] == "modernbert"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "student")) == len(tokenizer)
    longer = student.replaced(max_length=65)
    with pytest.raises(KdtrainError, match=r"student.max_length is 65, but .* reads at most 64 tokens"):
        run(recipe.replaced(student=longer, training=training, output=str(tmp_path / "long")))


def test_wrong_code_and_recipes(recipe: MaskedRecipe, corpus: Path, tmp_path: Path) -> None:
    for content, sentence in (
        ({"data": {}}, "data.train is missing: name folders"),
        ({"data": {"train": ["x"], "held_out": 1.5}}, "data.held_out must be below 1, got 1.5"),
        (
            {"data": {"train": ["x"]}, "student": {"architecture": "bigru"}},
            "encoders of architecture roberta",
        ),
        ({"data": {"trian": []}}, "unknown recipe key data.trian; did you mean data.train"),
    ):
        with pytest.raises(KdtrainError, match=sentence):
            recipe_from_dict({"task": "masked_lm", **content})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"func": "int x;"}) + "\n")
    with pytest.raises(
        KdtrainError, match=r"row 1 of data.train has no text in column 'code' \(columns: func\)"
    ):
        load_corpus(MaskedDataSection(train=(str(tmp_path / "rows.jsonl"),)))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.py").write_text("x = 1\n")
    with pytest.raises(KdtrainError, match="leaves 1 documents to train on and 0 to measure on"):
        load_corpus(MaskedDataSection(train=(str(tmp_path / "one"),), held_out=1e-9))
    with pytest.raises(
        KdtrainError, match="task must be one of classification, code_lm, masked_lm, study, got"
    ):
        (tmp_path / "vision.yaml").write_text("task: vision\n")
        from kdtrain.commands.train import main as train_main

        train_main(type("Words", (), {"recipe": str(tmp_path / "vision.yaml"), "overrides": []})())  # type: ignore[arg-type]
