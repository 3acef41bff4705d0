"""The loop end to end, on tiny models: it learns, it can be killed, it does not repeat itself."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.files import writing
from kdtrain.methods import method_options
from kdtrain.models.loading import positions_of
from kdtrain.recipe import ClassificationRecipe, DataSection, StudentSection, save_recipe
from kdtrain.run import run
from kdtrain.summary import Summary
from tests.support.commands import Program, torchrun


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock or the machine decides."""
    measured = ("tokens_per_second", "step_seconds", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in measured} for line in read_metrics(folder)]


def test_teacher_learns_the_task(teacher: Path) -> None:
    summary = Summary.load(teacher.parent)
    losses = [line["loss"] for line in read_metrics(teacher.parent) if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    assert summary.metrics["accuracy"] > 0.9
    assert summary.training["tokens"] > 0


def test_run_leaves_what_it_promises(teacher: Path) -> None:
    folder = teacher.parent
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json", "plots/learning_curve.png", "checkpoints"):
        assert (folder / name).exists(), name
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".tmp", ".old")]
    summary = Summary.load(folder)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    assert type(model).__module__.startswith("transformers.")
    assert model.config.id2label == {0: "KeyError", 1: "ValueError", 2: "OSError"}
    assert sum(p.numel() for p in model.parameters()) == summary.student["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    text = "def f(k, d):\n    try:\n        return d[k]\n    except __HOLE__:\n        pass\n"
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert int(logits.argmax()) == 0


@pytest.mark.xdist_group("programs")
def test_saved_student_gives_the_saved_predictions(teacher: Path) -> None:
    predictions = load_file(teacher.parent / "predictions" / "test.safetensors")
    accuracy = (predictions["logits"].argmax(1) == predictions["labels"]).double().mean()
    assert float(accuracy) == Summary.load(teacher.parent).metrics["accuracy"]


def test_killed_run_resumes_bit_for_bit(distillation: ClassificationRecipe, tmp_path: Path) -> None:
    """A process killed with -9 after a checkpoint, started again, ends with the same bytes as one left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    training = distillation.training.replaced(
        num_train_epochs=3, gradient_accumulation_steps=2, eval_steps=3, logging_steps=2
    )
    recipe = distillation.replaced(training=training)
    run(recipe.replaced(output=str(whole)))

    save_recipe(recipe.replaced(output=str(killed)), tmp_path / "recipe.yaml")
    command = ["kdtrain", "train", str(tmp_path / "recipe.yaml")]
    process = Program(command)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.kill() == -signal.SIGKILL, "the run was over before it could be killed"
    reached = max(int(path.name.removeprefix("step-")) for path in (killed / "checkpoints").glob("step-*"))
    assert 0 < reached < Summary.load(whole).training["steps"]

    again = Program(command)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"resumed at step {reached}" in errors
    assert lines(killed) == lines(whole)
    for name in ("student/model.safetensors", "projection.safetensors", "predictions/test.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.xdist_group("programs")
def test_a_run_told_to_stop_names_the_way_on(distillation: ClassificationRecipe, tmp_path: Path) -> None:
    """SIGTERM, as a scheduler sends it: one sentence, the code of a stopped program, and the checkpoint stays."""
    training = distillation.training.replaced(num_train_epochs=3, eval_steps=3, logging_steps=2)
    save_recipe(
        distillation.replaced(training=training, output=str(tmp_path / "run")), tmp_path / "recipe.yaml"
    )
    process = Program(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    told = re.fullmatch(
        rf"kdtrain: stopped by SIGTERM at step (\d+) of \d+; the same command resumes at step (\d+) \({tmp_path}/run/checkpoints/"
        r"step-\d+\)",
        errors.splitlines()[-1],
    )
    assert told is not None, errors
    assert 0 < int(told[1]) == int(told[2])


def test_labels_alone_need_labels(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    row = json.dumps({"code": "return 1", "label": -100}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 3)
    (tmp_path / "valid.jsonl").write_text(row.replace("-100", "0"))
    train, valid = str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl")
    with pytest.raises(
        KdtrainError, match="method ft learns from labels, and none of the 3 training rows has one; add"
    ):
        run(
            recipe.replaced(
                data=DataSection(train=train, valid=valid, classes=("a", "b")),
                output=str(tmp_path / "run"),
            )
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_is_refused_on_a_cpu(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    training = recipe.training.replaced(precision="fp16")
    with pytest.raises(KdtrainError, match=r"training\.precision fp16 needs a GPU"):
        run(recipe.replaced(training=training, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_run_of_one_step_learns(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    """A warmup begins at a rate of 0; it may not be the whole run."""
    found = []
    for warmup in (0.0, 0.9):
        training = recipe.training.replaced(max_steps=1, warmup_ratio=warmup)
        found.append(
            run(recipe.replaced(training=training, output=str(tmp_path / str(warmup)))).valid["loss"]
        )
    assert found[0] == found[1]


def test_a_second_run_of_one_folder_is_refused_while_the_first_is_at_work(
    recipe: ClassificationRecipe, tmp_path: Path
) -> None:
    with (
        writing(tmp_path / "run", "the run", "output"),
        pytest.raises(
            KdtrainError, match=rf"another run \(process {os.getpid()}\) is writing the run .*output$"
        ),
    ):
        run(recipe.replaced(output=str(tmp_path / "run")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"], "nothing was begun"


def test_finished_run_is_recognised_and_another_is_refused(
    recipe: ClassificationRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe.replaced(output=str(tmp_path / "run"), training=recipe.training.replaced(max_steps=2))
    first = run(recipe)
    written = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert run(recipe) == first
    assert "already done" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == written
    other = recipe.replaced(training=recipe.training.replaced(learning_rate=1e-4))
    with pytest.raises(
        KdtrainError, match=r"contains another run \(training.learning_rate: 0.003 there, 0.0001 here\)"
    ):
        run(other)
    # A run of another task left its own identity.
    (tmp_path / "run" / "checkpoints" / "identity.json").write_text('{"data": "x"}')
    with pytest.raises(KdtrainError, match=r"contains another run \(training.learning_rate"):
        run(other)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(KdtrainError, match=r"recipe.yaml must hold sections"):
        run(recipe)


def test_diverged_run_is_told(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    training = recipe.training.replaced(learning_rate=1e38, warmup_ratio=0.0)
    with pytest.raises(KdtrainError, match=r"the loss is (nan|inf) at step 2; lower training.learning_rate"):
        run(recipe.replaced(training=training, output=str(tmp_path / "run")))
    unlogged = training.replaced(max_steps=3, logging_steps=100)
    with pytest.raises(KdtrainError, match=r"the loss is nan at step 3; lower training.learning_rate"):
        run(recipe.replaced(training=unlogged, output=str(tmp_path / "unlogged")))
    assert not (tmp_path / "unlogged" / "student").exists()


def test_best_weights_are_restored(recipe: ClassificationRecipe, tmp_path: Path) -> None:
    """A rate that ruins the model after its first steps: the student of the best step is what is saved."""
    training = recipe.training.replaced(
        num_train_epochs=3, eval_steps=6, learning_rate=3e-3, metric_for_best_model="loss"
    )
    training = training.replaced(warmup_ratio=0.0, lr_scheduler_type="constant_with_warmup", max_steps=18)
    summary = run(recipe.replaced(training=training, output=str(tmp_path / "run")))
    values = {
        line["step"]: line["valid/loss"] for line in read_metrics(tmp_path / "run") if "valid/loss" in line
    }
    assert summary.training["best_step"] == min(values, key=lambda step: values[step])
    assert summary.valid["loss"] == pytest.approx(min(values.values()), rel=1e-5)


def test_bf16_and_bigru_train(distillation: ClassificationRecipe, tmp_path: Path) -> None:
    student = distillation.student.replaced(architecture="bigru")
    training = distillation.training.replaced(precision="bf16", num_train_epochs=6)
    summary = run(distillation.replaced(student=student, training=training, output=str(tmp_path / "run")))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert summary.student["architecture"] == "kdtrain_bigru"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student").num_labels == 3


@pytest.mark.parametrize("pad", [0, 5, None])
def test_a_tokenizer_with_another_padding_token(
    recipe: ClassificationRecipe, tmp_path: Path, pad: int | None
) -> None:
    """RoBERTa counts positions from the padding token's id, wherever that stands."""
    special = ["<s>", "</s>", "<unk>", "<mask>", "<cls>"]
    if pad is not None:
        special.insert(pad, "<pad>")
    rules = Tokenizer(models.BPE(unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator(["def f(x): return x"], trainer)
    padding = {} if pad is None else {"pad_token": "<pad>"}
    PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **padding
    ).save_pretrained(tmp_path / "tokenizer")
    student = recipe.student.replaced(tokenizer=str(tmp_path / "tokenizer"), max_length=24)
    training = recipe.training.replaced(max_steps=1)
    recipe = recipe.replaced(student=student, training=training, output=str(tmp_path / "run"))
    if pad is None:
        with pytest.raises(KdtrainError, match=r"has no padding token, from which RoBERTa counts positions"):
            run(recipe)
        return
    run(recipe)
    config = AutoConfig.from_pretrained(tmp_path / "run" / "student")
    assert (config.pad_token_id, positions_of(config)) == (pad, 24)


def test_starts_from_a_saved_model(recipe: ClassificationRecipe, teacher: Path, tmp_path: Path) -> None:
    """A finished classifier keeps what it knows; a masked language model gives its encoder and gets a new head."""
    training = recipe.training.replaced(max_steps=1, learning_rate=1e-6)
    student = StudentSection(path=str(teacher), max_length=64)
    summary = run(recipe.replaced(student=student, training=training, output=str(tmp_path / "run")))
    assert summary.metrics["accuracy"] == Summary.load(teacher.parent).metrics["accuracy"]

    classifier = AutoModelForSequenceClassification.from_pretrained(teacher)
    language_model = AutoModelForMaskedLM.from_config(classifier.config)
    language_model.roberta.load_state_dict(classifier.roberta.state_dict())
    language_model.save_pretrained(tmp_path / "mlm")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "mlm")
    student = student.replaced(path=str(tmp_path / "mlm"))
    run(recipe.replaced(student=student, training=training, output=str(tmp_path / "from_mlm")))
    started = AutoModelForSequenceClassification.from_pretrained(tmp_path / "from_mlm" / "student")
    for name, tensor in classifier.roberta.state_dict().items():
        torch.testing.assert_close(started.roberta.state_dict()[name], tensor, rtol=0, atol=1e-5)
    with pytest.raises(KdtrainError, match=r"student.max_length is 65, but .* reads at most 64 tokens"):
        run(recipe.replaced(student=student.replaced(max_length=65), output=str(tmp_path / "long")))


def mean_gradient(folder: Path) -> torch.Tensor:
    """All of AdamW's running mean of the gradients, as the last checkpoint has it."""
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    state = load_file(checkpoint / "optimizer.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state) if name.endswith(".exp_avg")])


# Features bring weights of their own; dist compares each row with every other one of the batch.
@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize(("method", "steps"), [("kd_features", 6), ("dist", 2)])
def test_two_processes_equal_one(
    distillation: ClassificationRecipe, tmp_path: Path, method: str, steps: int
) -> None:
    """torchrun with two gloo processes has the losses and gradients of one process, up to the order of sums.

    The first steps of AdamW move each weight by the sign of its gradient, and that of a gradient of nearly 0 is a matter
    of rounding. So the learning rate is small: what a wrong sign does to the next losses stays below rounding.
    """
    distillation = distillation.replaced(method=method_options(method))
    student = distillation.student.replaced(dropout=0.0)
    training = distillation.training.replaced(
        batch_size=13, max_steps=steps, logging_steps=1, eval_steps=steps, learning_rate=1e-6
    )
    recipe = distillation.replaced(student=student, training=training)
    run(recipe.replaced(output=str(tmp_path / "one")))
    save_recipe(recipe.replaced(output=str(tmp_path / "two")), tmp_path / "recipe.yaml")
    process = torchrun(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["training"]["processes"] == 2
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (one["step"], name)
    alone, both = mean_gradient(tmp_path / "one"), mean_gradient(tmp_path / "two")
    assert (both - alone).norm() <= 1e-3 * alone.norm()


@pytest.mark.xdist_group("programs")
def test_parts_of_a_classifier_are_refused(distillation: ClassificationRecipe, tmp_path: Path) -> None:
    """Its processes evaluate rows of their own, and parts of a model need all of them at every layer."""
    save_recipe(distillation.replaced(output=str(tmp_path / "run")), tmp_path / "recipe.yaml")
    process = torchrun(
        ["kdtrain", "train", str(tmp_path / "recipe.yaml")],
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    )
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "kdtrain: FSDP is for kdtrain train with task: code_lm" in errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
