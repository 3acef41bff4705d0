"""The hooks of a method: what they change, and that micro-batches and processes change nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.methods import METHODS, build_methods, check_methods
from kdtrain.methods.base import Step
from kdtrain.methods.ft import FineTuning
from kdtrain.methods.gkd import GeneralizedDistillation
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.mokd import MultiObjective
from kdtrain.models.loading import Shape
from kdtrain.objective import Objective
from kdtrain.tasks.code_lm.outputs import LanguageModels
from tests.language.conftest import tiny
from tests.language.frame_methods import KINDS, Hardest, objective_of, steps
from tests.language.test_objective import CPU, rows
from tests.language.test_processes import FSDP2, finish
from tests.support import commands

MEASURED = ("tokens_per_second", "step_seconds", "peak_memory_bytes")
HOOKS = [name for name in KINDS if name != "plain"]


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder)]


def same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """Equal up to the order of sums."""
    for one, two in zip(found, wanted, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", HOOKS)
def test_accumulation_does_not_change_what_a_hook_does(name: str, tmp_path: Path) -> None:
    steps(tmp_path / "whole", name, rows(packing=False))
    steps(tmp_path / "split", name, rows(packing=False), accumulation=3)
    steps(tmp_path / "plain", "plain", rows(packing=False))
    same(lines(tmp_path / "split"), lines(tmp_path / "whole"))
    plain, hooked = (lines(tmp_path / place)[-1]["valid/loss"] for place in ("plain", "whole"))
    assert abs(plain - hooked) > 1e-4, "the hook changed something"


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("mokd", {}, id="mokd-ddp"),
        pytest.param("mokd", FSDP2, id="mokd-fsdp2"),
        pytest.param("hardest", {}, id="hardest-ddp"),
        pytest.param("speculative_kd", FSDP2, id="speculative_kd-fsdp2"),
        pytest.param("distillm", {}, id="distillm-ddp"),
        pytest.param("uncertain", {}, id="uncertain-ddp"),
    ],
)
def test_two_processes_equal_one(name: str, options: dict[str, str], tmp_path: Path) -> None:
    """Batches of 5 and 3 rows: some processes have a micro-batch more, some only a filler."""
    alone = steps(tmp_path / "one", name, rows(packing=False))
    program = ["tests.language.frame_methods", str(tmp_path / "two"), name]
    finish(commands.torchrun(program, options))
    same(lines(tmp_path / "two"), lines(tmp_path / "one"))
    both = load_file(tmp_path / "two" / "state.safetensors")
    assert both.keys() == alone.keys()
    if name == "hardest":
        checkpoint = "checkpoints/step-0000003/model.safetensors"
        told = [load_file(tmp_path / place / checkpoint)["methods.0.told"] for place in ("one", "two")]
        torch.testing.assert_close(told[1], told[0], rtol=1e-4, atol=1e-5)
        assert bool((told[0] > 0).all()), "both hooks were called, and what they keep is checkpointed"


def test_selected_rows_are_all_that_the_teacher_sees() -> None:
    objective, data = objective_of("hardest"), rows(packing=False)
    seen: list[Any] = []
    batch_of = data.batch

    class Watched:
        lengths = data.lengths
        count = staticmethod(data.count)

        @staticmethod
        def batch(index: torch.Tensor, device: torch.device, *, stored: bool = True, **options: Any) -> Any:
            seen.append((stored, index.tolist()))
            return batch_of(index, device, **options)

    batch = objective.prepare_step(objective, Step(), torch.arange(8), Watched(), Accelerator(cpu=True), 2)
    list(batch)
    assert [rows for stored, rows in seen if not stored] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    learned = [row for stored, rows in seen if stored for row in rows]
    assert learned == batch.rows.tolist() and len(learned) == 4
    losses = objective.plan[0].score(
        Step(), data.batch(torch.arange(8), CPU), objective.outputs(data.batch(torch.arange(8), CPU))[0]
    )
    assert sorted(losses.topk(4).indices.tolist()) == learned
    assert batch.divisor == data.count(batch.rows)


def test_several_methods_learn_together() -> None:
    """The loss is the sum; a name that both have gets that of its method."""
    student = tiny("llama")
    options = [FineTuning.Options(ce_weight=0.3), LogitDistillation.Options(ce_weight=0.2, temperature=1.0)]
    shape = Shape(2, 32)
    models = objective_of("plain").models
    assert isinstance(models, LanguageModels)
    data = rows(packing=True)
    batch, divisor = data.batch(torch.arange(len(data)), CPU), data.count(torch.arange(len(data)))

    def loss(*chosen: Any) -> tuple[float, dict[str, torch.Tensor]]:
        objective = Objective(student, build_methods(chosen, "code_lm", shape, {"teacher": shape}), models)
        value, terms = objective(batch, divisor)
        return value.item(), terms

    both, terms = loss(*options)
    assert both == pytest.approx(sum(loss(one)[0] for one in options), rel=1e-5)
    assert list(terms) == ["ft_1.ce", "kd", "kd_2.ce"]


@pytest.mark.parametrize(
    ("names", "task", "sentence"),
    [
        (["dist"], "code_lm", "method dist is for task classification, got task: code_lm"),
        (["relations"], "classification", "method relations is for task code_lm, got task: classification"),
        (["sampled", "sampled"], "code_lm", "the methods sampled and sampled both make batches"),
        (["selected", "selected"], "code_lm", "both select rows, and only one may"),
        (["combined", "kd"], "code_lm", "method combined combines the gradients .* leave kd out"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(
    names: list[str], task: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in (
        ("sampled", GeneralizedDistillation),
        ("selected", Hardest),
        ("combined", MultiObjective),
    ):
        monkeypatch.setitem(METHODS, name, kind)
    options = [METHODS[name].Options() for name in names]  # type: ignore[call-arg]
    options = [one.model_copy(update={"name": name}) for one, name in zip(options, names, strict=True)]
    with pytest.raises(KdtrainError, match=sentence):
        check_methods(options, task)


def test_a_method_without_its_teacher_is_refused() -> None:
    with pytest.raises(
        KdtrainError, match=r"method kd needs a teacher; set teacher.path to a folder or hub id"
    ):
        build_methods([LogitDistillation.Options()], "code_lm", Shape(2, 32), {})


def test_a_batch_without_counted_positions_is_refused() -> None:
    """What a sampler made may not be empty."""
    objective, data = objective_of("gkd"), rows(packing=False)
    (method,) = objective.plan

    def nothing(step: Step, batch: Any, generate: Any) -> Any:
        return replace(batch, labels=torch.full_like(batch.labels, -100))

    method.make_batch = nothing
    with pytest.raises(KdtrainError, match="method gkd made a batch without any counted position at step 1"):
        objective.prepare_step(objective, Step(), torch.arange(8), data, Accelerator(cpu=True), 2)
