"""What a training section can ask for beside steps and rates, each seen in what a run leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdtrain.data.tokens import epoch_batches
from kdtrain.engine.checkpoint import steps_of
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.recipe import ClassificationRecipe, StudentSection
from kdtrain.run import run


@pytest.fixture
def short(recipe: ClassificationRecipe) -> ClassificationRecipe:
    training = recipe.training.replaced(max_steps=6, eval_steps=6, logging_steps=1)
    return recipe.replaced(training=training, student=recipe.student.replaced(dropout=0.0))


def changed(recipe: ClassificationRecipe, folder: Path, **fields: Any) -> ClassificationRecipe:
    return recipe.replaced(training=recipe.training.replaced(**fields), output=str(folder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_tensorboard_holds_the_lines_of_the_metrics(short: ClassificationRecipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(changed(short, tmp_path / "run", report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "run"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "valid/accuracy"} <= set(events.Tags()["scalars"])
    logged = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line}
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(logged) and len(found) == 6


def test_a_tracker_that_is_missing_is_refused(
    short: ClassificationRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        KdtrainError, match=r"report_to mlflow needs the package mlflow, which is not installed"
    ):
        run(changed(short, tmp_path / "run", report_to=("mlflow",)))
    assert not (tmp_path / "run").exists()


def test_checkpoints_apart_from_evaluations_and_as_many_as_asked(
    short: ClassificationRecipe, tmp_path: Path
) -> None:
    run(changed(short, tmp_path / "run", save_steps=1, save_total_limit=4))
    assert steps_of(tmp_path / "run" / "checkpoints") == [3, 4, 5, 6]
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "valid/loss" in line] == [6]


def test_recomputed_layers_take_the_same_steps(short: ClassificationRecipe, tmp_path: Path) -> None:
    run(changed(short, tmp_path / "plain"))
    run(changed(short, tmp_path / "again", gradient_checkpointing=True))
    for key, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "again")[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_student_that_cannot_recompute_is_refused(short: ClassificationRecipe, tmp_path: Path) -> None:
    bigru = StudentSection(architecture="bigru", vocab_size=320, hidden_size=16, layers=1, max_length=48)
    recipe = changed(short.replaced(student=bigru), tmp_path / "run", gradient_checkpointing=True)
    with pytest.raises(KdtrainError, match=r"gradient_checkpointing: BiGRU\w+ cannot recompute its layers"):
        run(recipe)


def test_rows_are_grouped_by_length_unless_told_otherwise() -> None:
    lengths = torch.arange(640)[torch.randperm(640, generator=torch.Generator().manual_seed(0))]

    def spread(grouped: bool) -> float:
        batches = epoch_batches(lengths, 16, 0, 0, group_by_length=grouped)
        assert torch.cat(batches).sort().values.tolist() == list(range(640))
        return float(torch.stack([lengths[rows].float().std() for rows in batches]).mean())

    assert spread(True) < 20 < 100 < spread(False)
    again = epoch_batches(lengths, 16, 0, 1, group_by_length=False)
    assert not torch.equal(again[0], epoch_batches(lengths, 16, 0, 0, group_by_length=False)[0])
