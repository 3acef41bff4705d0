"""Whose folder it is, and what a run does with files that changed since they were written."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kdtrain.checksums import check_sealed, seal, seal_again
from kdtrain.engine.checkpoint import latest_checkpoint, steps_of
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.recipe import ClassificationRecipe, StudentSection
from kdtrain.run import run


def flip(path: Path, place: float = 0.7) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = (flip, truncate, empty, remove)


@pytest.fixture(scope="module")
def short(recipe: ClassificationRecipe) -> ClassificationRecipe:
    """Six steps, evaluated after every second one."""
    training = recipe.training.replaced(max_steps=6, eval_steps=2, logging_steps=2)
    return recipe.replaced(training=training)


@pytest.fixture(scope="module")
def whole(short: ClassificationRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(short.replaced(output=str(folder)))
    return folder


def stopped(whole: Path, folder: Path) -> Path:
    """The run as a kill after its last checkpoint leaves it."""
    shutil.copytree(whole, folder)
    for name in ("student", "predictions", "plots"):
        shutil.rmtree(folder / name)
    for name in ("summary.json", "checksums.json"):
        (folder / name).unlink()
    return folder


def student(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


# ---- checkpoints


def test_two_checkpoints_are_kept_and_sealed(whole: Path) -> None:
    assert steps_of(whole / "checkpoints") == [4, 6]
    for step in (4, 6):
        path = whole / "checkpoints" / f"step-{step:07d}"
        check_sealed(path, "")
        best = json.loads((path / "state.json").read_text())["position"]["best_step"]
        check_sealed(whole / "checkpoints" / f"best-{best:07d}", "")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "tensors.safetensors", "state.json", "checksums.json"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    short: ClassificationRecipe,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    folder = stopped(whole, tmp_path / "run")
    path = folder / "checkpoints" / "step-0000006" / name
    damage(path)
    run(short.replaced(output=str(folder)))
    said = capsys.readouterr().err
    # Checksums that changed accuse another file of the folder, or have one bit of a name flipped.
    named = str(path.parent if (name, damage) == ("checksums.json", flip) else path)
    assert named in said and "an older checkpoint is used" in said and "resumed at step 4 of 6" in said
    assert student(folder) == student(whole)
    assert steps_of(folder / "checkpoints") == [4, 6]


def test_no_checkpoint_that_is_whole_is_a_sentence(
    short: ClassificationRecipe, whole: Path, tmp_path: Path
) -> None:
    folder = stopped(whole, tmp_path / "run")
    for step in (4, 6):
        flip(folder / "checkpoints" / f"step-{step:07d}" / "model.safetensors")
    with pytest.raises(
        KdtrainError,
        match=r"no checkpoint in \S+ is whole \(\S+step-0000004/model.safetensors is damaged.*; delete",
    ):
        run(short.replaced(output=str(folder)))


def test_folders_of_other_names_are_no_checkpoints(
    short: ClassificationRecipe, whole: Path, tmp_path: Path
) -> None:
    """They are neither loaded nor deleted, and numbers are compared as numbers."""
    folder = stopped(whole, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "step-0000006", checkpoints / "step-0000006.bak")
    (checkpoints / "best-of-all").mkdir()
    (checkpoints / "step-9").write_text("a note")
    run(short.replaced(output=str(folder)))
    assert student(folder) == student(whole)
    assert {"step-0000006.bak", "best-of-all", "step-9"} <= {path.name for path in checkpoints.iterdir()}
    for step in (9_999_000, 10_000_000):
        (tmp_path / "many" / f"step-{step:07d}").mkdir(parents=True)
    assert latest_checkpoint(tmp_path / "many") == tmp_path / "many" / "step-10000000"


def test_a_checkpoint_of_another_recipe_is_refused(
    short: ClassificationRecipe, whole: Path, tmp_path: Path
) -> None:
    folder = stopped(whole, tmp_path / "run")
    other = short.replaced(seed=5, output=str(folder))
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("seed: 0", "seed: 5"))
    with pytest.raises(KdtrainError, match=r"step-0000006 was written by a run with another recipe"):
        run(other)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(
        KdtrainError, match=r"holds checkpoints, but no recipe.yaml that names the run they are of"
    ):
        run(other)


# ---- what a finished run leaves


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "student/model.safetensors",
        "student/config.json",
        "student/tokenizer.json",
        "predictions/test.safetensors",
        "summary.json",
    ],
)
def test_already_done_is_said_of_whole_files_only(
    short: ClassificationRecipe, whole: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(folder / name)
    with pytest.raises(
        KdtrainError, match=rf"{name} is (damaged: it has changed|missing).*; delete (\S+checksums.json), and"
    ):
        run(short.replaced(output=str(folder)))
    (folder / "checksums.json").unlink()  # the way out that the sentence names
    run(short.replaced(output=str(folder)))
    assert student(folder) == student(whole)


def test_checksums_that_are_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    seal(tmp_path)
    (tmp_path / "two").write_text("2")
    seal_again(tmp_path, "two", "")
    check_sealed(tmp_path, "make it again")
    (tmp_path / "two").write_text("3")
    check_sealed(tmp_path, "make it again", "one")
    with pytest.raises(
        KdtrainError, match=r"two is damaged: it has changed since it was written; make it again$"
    ):
        check_sealed(tmp_path, "make it again")
    for content in ("", "[]", '{"a": 1}', "{" * 3):
        (tmp_path / "checksums.json").write_text(content)
        with pytest.raises(KdtrainError, match=r"checksums.json is damaged \(.+\); make it again$"):
            check_sealed(tmp_path, "make it again")


# ---- whose it is


@pytest.mark.parametrize("name", ["student", "predictions", "summary.json", "projection.safetensors"])
def test_files_that_no_run_wrote_stay(short: ClassificationRecipe, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if "." in name:
        (folder / name).write_text("mine")
    else:
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    with pytest.raises(KdtrainError, match=rf"{folder} holds {name}, but no recipe.yaml"):
        run(short.replaced(output=str(folder)))
    assert sorted(path.name for path in folder.rglob("*") if path.name != ".lock") == sorted(
        {name, *(["notes.txt"] * ("." not in name))}
    )


def test_start_weights_and_tokenizer_are_part_of_a_run(
    short: ClassificationRecipe, whole: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(whole / "student", start)
    student = StudentSection(path=str(start), max_length=short.student.max_length)
    training = short.training.replaced(max_steps=2)
    given = short.replaced(student=student, training=training, output=str(tmp_path / "run"))
    run(given)
    weights = load_file(start / "model.safetensors")
    weights["roberta.encoder.layer.0.output.dense.weight"] += 1e-3
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        KdtrainError, match=r"contains another run \(the content of the weights at student.path has changed"
    ):
        run(given)
    shutil.copy(whole / "student" / "model.safetensors", start / "model.safetensors")
    run(given)
    rules = json.loads((start / "tokenizer.json").read_text())
    rules["model"]["merges"].pop()
    (start / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(
        KdtrainError, match=r"contains another run \(the content of the student's tokenizer has changed"
    ):
        run(given)


def test_a_damaged_tokenizer_of_the_run_is_named(
    short: ClassificationRecipe, whole: Path, tmp_path: Path
) -> None:
    folder = stopped(whole, tmp_path / "run")
    flip(folder / "checkpoints" / "tokenizer" / "tokenizer.json")
    with pytest.raises(
        KdtrainError,
        match=r"tokenizer/tokenizer.json is damaged.*; delete \S+tokenizer, and the same command trains",
    ):
        run(short.replaced(output=str(folder)))


def _start(recipe: ClassificationRecipe, gate: Any, told: Any) -> None:
    torch.set_num_threads(1)
    gate.wait()
    try:
        run(recipe)
        told.put((recipe.seed, ""))
    except KdtrainError as error:
        told.put((recipe.seed, str(error)))


def test_two_recipes_started_at_once_never_mix(short: ClassificationRecipe, tmp_path: Path) -> None:
    """One of two different runs gets the new folder, whole; the other one is refused."""
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        folder, gate, told = tmp_path / str(attempt), context.Barrier(2), context.Queue()
        recipes = [short.replaced(seed=seed, output=str(folder)) for seed in (1, 2)]
        started = [context.Process(target=_start, args=(recipe, gate, told)) for recipe in recipes]
        for process in started:
            process.start()
        sentences = dict(told.get(timeout=120) for _ in started)
        for process in started:
            process.join()
        refused = [seed for seed, sentence in sentences.items() if sentence]
        assert len(refused) == 1, sentences
        assert (
            "is writing the run" in sentences[refused[0]] or "contains another run" in sentences[refused[0]]
        )
        (winner,) = {1, 2} - set(refused)
        assert json.loads((folder / "summary.json").read_text())["seed"] == winner
        assert f"seed: {winner}\n" in (folder / "recipe.yaml").read_text()


# ---- what a folder may become


def test_a_run_that_failed_before_its_first_checkpoint_gives_its_folder_back(
    short: ClassificationRecipe, tmp_path: Path
) -> None:
    diverging = short.training.replaced(learning_rate=1e38, warmup_ratio=0.0, logging_steps=1)
    with pytest.raises(KdtrainError, match="the loss is"):
        run(short.replaced(training=diverging, output=str(tmp_path / "run")))
    assert (tmp_path / "run" / "recipe.yaml").exists()
    mended = run(short.replaced(output=str(tmp_path / "run")))
    assert mended.training["steps"] == 6
    assert f"learning_rate: {short.training.learning_rate}" in (tmp_path / "run/recipe.yaml").read_text()


def test_a_field_that_was_added_since_does_not_make_another_run(
    short: ClassificationRecipe, whole: Path, tmp_path: Path
) -> None:
    folder = stopped(whole, tmp_path / "run")
    content = yaml.safe_load((folder / "recipe.yaml").read_text())
    for section, name in (("training", "group_by_length"), ("data", "focus"), ("method", "ce_weight")):
        del content[section][name]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    run(short.replaced(output=str(folder)))
    assert student(folder) == student(whole)
    with pytest.raises(KdtrainError, match=r"contains another run \(method.ce_weight: 1.0 there, 0.5 here\)"):
        run(short.replaced(output=str(folder), method=method_options("ft", ce_weight=0.5)))


def test_a_finished_run_goes_further_with_more_steps(
    short: ClassificationRecipe, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a constant rate the longer run is, to the bit, the one that was long from the start."""
    constant = short.training.replaced(
        lr_scheduler_type="constant_with_warmup", warmup_ratio=0.0, max_steps=4
    )
    recipe = short.replaced(training=constant, output=str(tmp_path / "run"))
    run(recipe)
    longer = constant.replaced(max_steps=6)
    assert run(recipe.replaced(training=longer)).training["steps"] == 6
    assert "resumed at step 4 of 6" in capsys.readouterr().err
    run(recipe.replaced(training=longer, output=str(tmp_path / "long")))
    assert student(tmp_path / "run") == student(tmp_path / "long")
    with pytest.raises(KdtrainError, match=r"training.max_steps: 6 there, 5 here"):
        run(recipe.replaced(training=constant.replaced(max_steps=5)))
