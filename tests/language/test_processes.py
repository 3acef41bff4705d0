"""Two gloo processes, replicated (DDP) and sharded (FSDP2), take the same steps as one, and survive kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.recipe import LanguageRecipe, save_recipe
from kdtrain.run import run
from tests.language.conftest import tiny
from tests.language.trainer_steps import steps
from tests.support import commands
from tests.support.commands import Program

pytestmark = pytest.mark.xdist_group("programs")

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
TRAINER_DEEPSPEED = {
    "ACCELERATE_USE_CPU": "false",  # accelerate's switch for the CPU turns DeepSpeed off; DeepSpeed has its own
    "DS_ACCELERATOR": "cpu",
}
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
MEASURED = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder)]


def launch(recipe: Path, options: dict[str, str]) -> "subprocess.Popen[str] | Program":
    """kdtrain train in two processes; with FSDP2 they are forks, the others start as a user's do."""
    words = ["kdtrain", "train", str(recipe)]
    return commands.torchrun(words, options) if "FSDP_VERSION" in options else torchrun(words, options)


def torchrun(module: list[str], options: dict[str, str]) -> "subprocess.Popen[str]":
    """A module with its arguments in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, "-m", *module],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true", **options},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str] | Program") -> str:
    """Its remarks, once it has ended well."""
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return errors


def worker(agent: int, rank: int) -> int:
    """The process that torchrun started for this rank: it starts them in their order."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            numbers = path.read_text().rsplit(")", 1)[1].split()
            if int(numbers[1]) == agent:
                children.append((int(numbers[19]), int(path.parent.name)))
    assert len(children) == 2, f"torchrun {agent} has the workers {children}"
    return sorted(children)[rank][1]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="ddp"),
        pytest.param(FSDP2, id="fsdp2"),
    ],
)
def test_two_processes_equal_one(
    language_distillation: LanguageRecipe, tmp_path: Path, options: dict[str, str]
) -> None:
    """Odd batches, accumulation, a tied head, hidden states: the same losses and the same student."""
    training = language_distillation.training.replaced(
        max_steps=4, eval_steps=4, logging_steps=1, gradient_accumulation_steps=2
    )
    recipe = language_distillation.replaced(training=training)
    run(recipe.replaced(output=str(tmp_path / "one")))
    save_recipe(recipe.replaced(output=str(tmp_path / "two")), tmp_path / "recipe.yaml")
    finish(launch(tmp_path / "recipe.yaml", options))
    alone, both = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert both["training"]["processes"] == 2 and both["student"] == alone["student"]
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (one["step"], name)
    before, after = (load_file(tmp_path / name / "student/model.safetensors") for name in ("one", "two"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_killed_process_is_told_and_the_run_resumes_bit_for_bit(
    language_distillation: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process that writes is killed with -9 behind a checkpoint. The other one says which is gone and where the run

    goes on; started again, it ends with the bytes of a run left alone.
    """
    training = language_distillation.training.replaced(max_steps=9, eval_steps=3, logging_steps=1)
    recipe = language_distillation.replaced(training=training)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        save_recipe(recipe.replaced(output=str(folder)), tmp_path / f"{folder.name}.yaml")
    finish(launch(tmp_path / "whole.yaml", FSDP2))

    process = launch(tmp_path / "killed.yaml", FSDP2)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(worker(process.pid, rank=0), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    reached = max(int(path.name.removeprefix("step-")) for path in (killed / "checkpoints").glob("step-*"))
    assert 0 < reached < 9, "the run was over before it could be killed"
    assert errors.count("process 0 of 2 ended in the middle of training: killed") == 1, errors[-3000:]
    assert f"the same command resumes at step {reached} ({killed}/checkpoints/step-" in errors

    shutil.copytree(killed, tmp_path / "alone")
    alone = recipe.replaced(output=str(tmp_path / "alone"))
    # One process goes on where two stopped: the same up to the order of sums.
    run(alone)
    assert "the checkpoint is of 2 processes, 1 go on" in capsys.readouterr().err
    for one, two in zip(lines(tmp_path / "alone"), lines(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)

    assert f"resumed at step {reached}" in finish(launch(tmp_path / "killed.yaml", FSDP2))
    assert lines(killed) == lines(whole)
    for name in ("student/model.safetensors", "projection.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        pytest.param(("ddp", "fsdp2"), {}, id="torch"),
        pytest.param(("zero2", "zero3"), TRAINER_DEEPSPEED, id="deepspeed", marks=NEEDS_DEEPSPEED),
    ],
)
def test_two_processes_of_trainer_equal_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kinds: tuple[str, ...], options: dict[str, str]
) -> None:
    """KDTrainer: losses, gradient norms, metrics of an odd number of rows, and the student."""
    tiny("llama").save_pretrained(tmp_path / "student")
    tiny("qwen3", 1, hidden_size=48).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    found, weights = steps(tmp_path)
    start = torchrun if options else commands.torchrun
    finish(start(["tests.language.trainer_steps", str(tmp_path), *kinds], options))
    for kind in kinds:
        for name, values in json.loads((tmp_path / f"{kind}.json").read_text()).items():
            assert values == pytest.approx(found[name], rel=1e-4), (kind, name)
        after = load_file(tmp_path / f"{kind}.safetensors")
        assert after.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_deepspeed_is_refused(
    language_recipe: LanguageRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        KdtrainError, match=r"FSDP2 and not with DeepSpeed; use recipes/accelerate/fsdp2.yaml"
    ):
        run(language_recipe.replaced(output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
