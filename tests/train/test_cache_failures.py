"""What happens to a teacher cache when things go wrong: damage, kills, second writers, rows of another model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdtrain.errors import KdtrainError
from kdtrain.files import _host
from kdtrain.models.teachers import Teacher, load_teacher
from kdtrain.recipe import ClassificationRecipe, DataSection
from kdtrain.tasks.classification.splits import ClassificationData, load_classification
from kdtrain.teacher_cache.store import Store, shard_paths
from tests.support.commands import Program
from tests.train.conftest import CLASSES
from tests.train.test_cache import build, check, spec_of


@pytest.fixture(scope="module")
def data(toy: Path) -> ClassificationData:
    return load_classification(DataSection(path=str(toy)))


@pytest.fixture(scope="module")
def model(teacher: Path) -> Teacher:
    return load_teacher(str(teacher), CLASSES)


def test_verify_finds_a_flipped_byte(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    spec = spec_of(model)
    build(tmp_path, model, spec, data)
    assert check(tmp_path, model, spec, data) == 10
    (shard,) = shard_paths(tmp_path)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # the lowest bits of one feature: no recomputation with a tolerance could tell
    shard.write_bytes(content)
    with pytest.raises(KdtrainError, match=rf"{shard.name} has changed since it was written"):
        check(tmp_path, model, spec, data)
    shard.unlink()  # what the sentence advises
    build(tmp_path, model, spec, data)
    assert check(tmp_path, model, spec, data) == 10


def test_verify_finds_rows_of_another_model(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    """Whole shards with whole checksums that the teacher never produced."""
    spec = spec_of(model)
    with torch.no_grad():
        model.model.classifier.out_proj.bias += 0.5  # type: ignore[union-attr, operator]
        build(tmp_path, model, spec, data)
        model.model.classifier.out_proj.bias -= 0.5  # type: ignore[union-attr, operator]
    with pytest.raises(KdtrainError, match=r"the stored logits differ from the recomputed ones by 0.5"):
        check(tmp_path, model, spec, data)


@pytest.mark.xdist_group("programs")
def test_cut_shard_is_a_sentence(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    build(tmp_path, model, spec_of(model), data)
    (shard,) = shard_paths(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(KdtrainError, match=rf"{shard.name} is damaged .* delete this one file"):
        Store.open(tmp_path, spec_of(model))


def test_a_folder_that_is_no_whole_cache(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    spec, folder = spec_of(model), tmp_path / "cache"
    build(folder, model, spec, data)
    manifest = folder / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content.replace('"tensors"', '"tensorz"'))
    with pytest.raises(KdtrainError, match=r"manifest.json is damaged, it has no tensors"):
        Store.open(folder, spec)
    manifest.unlink()
    with pytest.raises(KdtrainError, match=r"has no manifest.json, so nothing says whose outputs these are"):
        build(folder, model, spec, data)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(KdtrainError, match=r"cannot be written: .*; give another teacher.cache"):
            build(place, model, spec, data)


def test_killed_build_goes_on(tmp_path: Path, distillation: ClassificationRecipe, teacher: Path) -> None:
    """kill -9 between two shards: the shards stay, the next build computes the rest only."""
    rows = "".join(json.dumps({"code": f"x{i} = d[{i}]", "label": i % 3}) + "\n" for i in range(6000))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "recipe.yaml").write_text(
        f"task: classification\ndata: {{train: {tmp_path}/rows.jsonl, valid: {tmp_path}/rows.jsonl, classes: [{', '.join(CLASSES)}]}}\n"
        f"teacher: {{path: {teacher}, cache: {tmp_path}/cache, batch_tokens: 1024}}\nmethod: {{name: kd}}\n"
    )
    command = ["kdtrain", "cache", str(tmp_path / "recipe.yaml")]
    process = Program(command)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.kill() == -signal.SIGKILL, "the build was over before it could be killed"
    kept = sum(len(load_file(path)["keys"]) for path in shard_paths(tmp_path / "cache"))
    assert 2048 <= kept < 6000
    again = Program([*command, "--verify"])
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"teacher cache: {6000 - kept} rows (logits: {6000 - kept} x 3 float32), " in errors
    assert "all checksums hold and 64 recomputed rows agree" in errors


def test_two_writers_of_one_cache(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    """The second is refused while the first is at work, and goes on when it is gone; what that left half written goes too."""
    holder = (
        "import sys, pathlib; from kdtrain.files import writing\n"
        f"with writing(pathlib.Path({str(tmp_path)!r}), 'x', 'y'): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", holder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(
        KdtrainError, match=rf"another run \(process {process.pid}\) is writing the teacher cache"
    ):
        build(tmp_path, model, spec_of(model), data)
    for name, kind in (("file", "tmp"), ("folder", "tmp/inner"), ("folder", "old/inner")):
        left = tmp_path / f".{name}.{_host()}-{process.pid}.{kind}"
        left.parent.mkdir(exist_ok=True)
        left.touch()
    (tmp_path / "folder").mkdir()  # a newer one stands where the old one was
    process.kill()  # the lock goes with its holder
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert len(build(tmp_path, model, spec_of(model), data)) == 40
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]
