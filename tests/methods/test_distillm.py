"""DistiLLM (arXiv 2402.03898): the controller, the replay buffer, and a run that goes on after it was killed."""

import shutil
from pathlib import Path

import pytest
import torch

from kdtrain.methods.base import Method, Step
from kdtrain.methods.sampling import Written, uniform
from tests.language.conftest import tiny
from tests.language.frame_methods import steps
from tests.language.test_objective import rows
from tests.methods.test_sampling import batch_of
from tests.methods.test_speculative_kd import Here, built, tokens


def test_the_threshold_rises_with_the_loss_2402_03898() -> None:
    method, found = built("distillm"), []
    for loss in (2.0, 2.05, 2.11, 2.2, 2.5, 1.0, 9.0):
        method.after_evaluate(Step(), {"loss": loss})
        found.append(round(float(method.logged()["sampling_threshold"]), 4))
    assert found == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3]
    for number in range(20):
        method.after_evaluate(Step(), {"loss": 10.0 + number})
    assert float(method.logged()["sampling_threshold"]) == 1.0


@pytest.mark.parametrize("replay", ["decreasing", "increasing", "constant"])
def test_where_a_step_takes_its_rows_from_2402_03898(replay: str) -> None:
    method = built("distillm", first_threshold=0.6, replay=replay, replay_capacity=5)
    for number in range(60):
        step = Step(number, 60, seed=1)
        r = float(uniform(1, 1, number))
        share = {"decreasing": 1 - number / 59, "increasing": number / 59, "constant": 0.5}[replay]
        method.get_buffer("stored").fill_(3)
        assert method.source(step) == ("student" if r < 0.6 else "data"), "the buffer is not full"  # type: ignore[operator]
        method.get_buffer("stored").fill_(5)
        wanted = "student" if r < 0.6 * share else "replay" if r < 0.6 else "data"
        assert method.source(step) == wanted  # type: ignore[operator]


def stored(method: Method) -> list[list[int]]:
    """The rows of a buffer in its order."""
    sizes, ids = method.get_buffer("sizes"), method.get_buffer("rows")
    return [row[: size[1]].tolist() for row, size in zip(ids, sizes, strict=True) if size[1]]


def test_the_buffer_keeps_the_newest_rows() -> None:
    method = built("distillm", replay_capacity=3, replay_width=4)

    def put(*made: list[int]) -> None:
        width = max(map(len, made))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in made])
        lengths = torch.tensor([len(row) for row in made])
        method.store(
            Written(ids, torch.ones_like(lengths), lengths, torch.zeros(len(made), 2)), Here(None, None)
        )  # type: ignore[operator]

    put([1, 2], [3, 4, 5])
    assert stored(method) == [[1, 2], [3, 4, 5]]
    put([6, 7, 8, 9, 10], [11])  # longer than a row; nothing but a prompt
    assert stored(method) == [[1, 2], [3, 4, 5]]
    put([12, 13], [14, 15])
    assert stored(method) == [[14, 15], [3, 4, 5], [12, 13]]
    put([20, 1], [21, 1], [22, 1], [23, 1])
    assert sorted(stored(method)) == [[21, 1], [22, 1], [23, 1]]


def test_replayed_rows_are_rows_of_the_buffer() -> None:
    student, teacher = tiny("llama"), tiny("qwen2", 1, hidden_size=48)
    method = built("distillm", first_threshold=1.0, replay="increasing", replay_capacity=8)
    batch = batch_of()
    sampled = method.make_batch(Step(0, 9, seed=3), batch, Here(student, teacher))
    assert int(method.get_buffer("stored")) == 8
    replayed = method.make_batch(Step(1, 1000, seed=3), batch, Here(None, None))
    assert len(replayed.labels) == 8
    assert all(row in tokens(sampled) for row in tokens(replayed))
    split = [method.make_batch(Step(1, 1000, seed=3), batch_of(*index), Here(None, None)) for index in ((0, 1), (2, 3, 4, 5, 6, 7))]  # fmt: skip
    assert [row for part in split for row in tokens(part)] == tokens(replayed)


def test_a_killed_run_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    data = rows(packing=False)
    whole = steps(tmp_path / "whole", "distillm", data, save_steps=1)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-0000003")
    again = steps(tmp_path / "killed", "distillm", data, save_steps=1)
    assert int(whole["methods.0.stored"]) > 0
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


def test_skewed_kl_is_the_default_2402_03898() -> None:
    assert built("distillm").options.divergence == "skew_kl"
