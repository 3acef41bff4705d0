"""A teacher on a server: the same store and the same training as the teacher itself, over real HTTP."""

import json
import re
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from kdtrain.cli import main
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.code_lm import evaluate_language_run
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.models.head_file import empty_model, read_head
from kdtrain.models.heads import head_of
from kdtrain.recipe import LanguageRecipe, save_recipe
from kdtrain.run import run
from kdtrain.summary import Summary
from kdtrain.tasks.code_lm.served import ServedTeacher, ServedWork
from kdtrain.tasks.code_lm.task import CodeLM
from kdtrain.tasks.code_lm.work import segments_of
from kdtrain.teacher_cache.shard import map_file
from kdtrain.teacher_cache.store import shard_paths
from tests.server.conftest import Start, served
from tests.support.commands import torchrun

CPU = torch.device("cpu")


def contents(folder: Path) -> dict[bytes, dict[str, bytes]]:
    """The bytes of every tensor of every row of a store, by key."""
    found: dict[bytes, dict[str, bytes]] = {}
    for path in shard_paths(folder):
        tensors = map_file(path, "")
        keys, lengths = tensors.pop("keys"), tensors.pop("lengths").tolist()
        del tensors["checksums"]
        for name, values in tensors.items():
            for key, part in zip(keys, values.split(lengths), strict=True):
                row = found.setdefault(bytes(key.tolist()), {})
                row[name] = part.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def losses(folder: Path) -> list[float]:
    return [
        line[name]
        for line in read_metrics(folder)
        for name in ("loss", "grad_norm", "valid/loss")
        if name in line
    ]


def test_the_store_of_a_server_is_that_of_the_teacher(
    distillation: LanguageRecipe, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, hidden states in bfloat16 and top-k entries; then training needs no server."""
    _, pooling = start()
    _, generating = start(pooling=False)
    for signal, url in (("hidden", pooling), ("topk", generating)):
        local = distillation.replaced(
            teacher=distillation.teacher.replaced(signal=signal, top_k=9),
            output=str(tmp_path / signal / "local"),
        )
        remote = served(local, tmp_path / signal / "served", None)
        for recipe, words in ((local, []), (remote, ["--teacher.url", url])):
            save_recipe(recipe, tmp_path / "recipe.yaml")
            assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify", *words]) == 0
            assert "recomputed rows agree" in capsys.readouterr().err
        mine, theirs = (
            contents(tmp_path / signal / kind / "teacher_cache" / signal) for kind in ("served", "local")
        )
        assert mine == theirs and len(mine) > 30
        run(local)
        run(remote)  # which names no server
        steps = 2 * distillation.training.max_steps  # type: ignore[operator]
        found, wanted = (losses(tmp_path / signal / kind) for kind in ("served", "local"))
        assert found == wanted and len(found) == steps + 1
        summary = Summary.load(tmp_path / signal / "served")
        assert ("divergence" in summary.valid) == (signal == "hidden")
        measured = evaluate_language_run(tmp_path / signal / "served")
        assert {name: measured[name] for name in summary.valid} == pytest.approx(summary.valid, rel=1e-4)


def test_ten_steps_ask_ahead_and_equal_the_local_teacher(
    distillation: LanguageRecipe, start: Start, tmp_path: Path
) -> None:
    """Loss and norm of the gradient of every step; every segment is asked once for every time it is read."""
    run(distillation.replaced(output=str(tmp_path / "local")))
    teacher, url = start()
    other, second = start()
    run(served(distillation, tmp_path / "served", f"{url},{second}", dtype="float32"))
    found, wanted = losses(tmp_path / "served"), losses(tmp_path / "local")
    assert found == pytest.approx(wanted, rel=1e-5) and len(found) == 21
    assert min(one.requests.count("/pooling") for one in (teacher, other)) > 20, "spread by load"
    shares = [line["teacher_wait_share"] for line in read_metrics(tmp_path / "served") if "loss" in line]
    assert len(shares) == 10 and all(0 <= share <= 1 for share in shares)

    entries, generating = start(pooling=False, max_logprobs=300)
    run(served(distillation, tmp_path / "topk", generating, targets="topk", top_k=286, tail="renormalize"))
    found = losses(tmp_path / "topk")
    assert found == pytest.approx(wanted, rel=1e-4)
    with closing(CodeLM(served(distillation, tmp_path, url))) as task:
        read = sum(len(rows) for rows in task_steps(task))
    asked = entries.requests.count("/v1/completions")
    assert asked == read + 3, "and three for the checks"


def task_steps(task: CodeLM) -> list[list[int]]:
    """The segments that are read in each step."""
    data = task.prepare(Accelerator(cpu=True)).train
    return [data.stored.segments_at(step) for step in range(1, 11)]  # type: ignore[attr-defined]


def test_only_the_head_is_read(language_teacher: Path, tmp_path: Path) -> None:
    """From the one file that holds it; the other files of the checkpoint need not be there."""
    model = AutoModelForCausalLM.from_pretrained(language_teacher)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    names = [name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in index]
    for path in tmp_path.glob("*.safetensors"):
        if path.name != index[names[0]]:
            path.unlink()
    found = empty_model(str(tmp_path), "teacher.path", torch.float32)
    read_head(found, str(tmp_path), "teacher.path")
    assert torch.equal(head_of(found).weight, head_of(model).weight)
    meta = [name for name, value in found.named_parameters() if value.is_meta]
    assert len(meta) == len(list(model.named_parameters())) - 1
    (tmp_path / index[names[0]]).unlink()
    with pytest.raises(
        KdtrainError, match=r"teacher.path: no head could be loaded from .*no safetensors file"
    ):
        read_head(empty_model(str(tmp_path), "teacher.path", torch.float32), str(tmp_path), "teacher.path")


def test_a_server_that_dies_leaves_what_was_written(
    distillation: LanguageRecipe,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One error with the address; the same command asks for the rest only."""
    monkeypatch.setattr("kdtrain.teacher_cache.server.connection.PATIENCE", 0.5)
    monkeypatch.setattr("kdtrain.teacher_cache.build.SHARD_ROWS", 4)
    monkeypatch.setattr("kdtrain.tasks.code_lm.served.AHEAD_BYTES", 64 * 50)
    teacher, url = start(fault=lambda number, path: "500" if number > 25 else None)
    recipe = served(distillation, tmp_path / "run", url, signal="hidden")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = ["cache", str(tmp_path / "recipe.yaml")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"kdtrain: {url} did not answer for 0 s: /pooling answered 500 .*the same command continues", said
    )
    folder = tmp_path / "run" / "teacher_cache" / "hidden"
    kept = contents(folder)
    assert 8 < len(kept) < 25 and not list(folder.glob(".*.tmp"))
    teacher.fault = lambda number, path: None
    teacher.requests.clear()
    assert main(command) == 0
    whole = contents(folder)
    assert {key: whole[key] for key in kept} == kept
    # Three to look at the server and two to ask again of what was stored; for the held-out rows three to look.
    assert teacher.requests.count("/pooling") == len(whole) - len(kept) + 3 + 2 + 3 + 3


def test_traffic_is_bounded_and_told(
    distillation: LanguageRecipe, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow reader: no more is asked than fits in the bound; the remark of the bar has tokens/s and bytes/s."""
    teacher, url = start()
    with closing(CodeLM(served(distillation, tmp_path, url, signal="hidden"))) as task:
        task.identity()
        target = task.target("hidden")
        assert isinstance(task.teacher, ServedTeacher)
        segments, _ = segments_of(task.rows[0])
        monkeypatch.setattr("kdtrain.tasks.code_lm.served.AHEAD_BYTES", 64 * 200)
        with closing(ServedWork(task.teacher, target, segments, CPU)) as work:
            batches = [torch.tensor([row]) for row in range(len(segments))]
            work.expect(batches)
            time.sleep(1.0)
            asked = teacher.requests.count("/pooling")
            assert int(segments.lengths[:asked].sum()) <= 200 < int(segments.lengths[: asked + 1].sum())
            for rows in batches:
                work.compute(rows, ["hidden"])
            assert re.fullmatch(r"\d+ tokens/s, \d+\.\d\d MB/s", work.note())
        assert teacher.requests.count("/pooling") == len(segments)


@pytest.mark.xdist_group("programs")
def test_two_processes_ask_each_for_their_own(
    distillation: LanguageRecipe, start: Start, tmp_path: Path
) -> None:
    """Training with accumulation on two processes: the losses of one, and every segment asked once a read."""
    teacher, url = start()
    training = distillation.training.replaced(gradient_accumulation_steps=2)
    recipe = served(distillation, tmp_path / "two", url, dtype="float32").replaced(training=training)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    program = torchrun(["kdtrain", "train", str(tmp_path / "recipe.yaml")])
    _, errors = program.communicate()
    assert program.returncode == 0, errors[-3000:]
    asked = teacher.requests.count("/pooling")
    run(recipe.replaced(output=str(tmp_path / "one"), training=distillation.training))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert found == pytest.approx(wanted, rel=1e-4) and len(found) == 21
    alone = teacher.requests.count("/pooling") - asked
    assert asked == alone + 2 * 3, (
        "the second process looks at the server, too: for training and held-out rows"
    )
