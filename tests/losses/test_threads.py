"""Rows shared out to the CPU's threads: the same numbers, the caller's modes, and no thread setting that leaks."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from kdkernels import (
    JSD,
    Decoupled,
    Divergence,
    ForwardKL,
    TeacherTopK,
    kd_loss,
)
from kdkernels._torch import threads as pools
from kdkernels._torch.sizes import worker_count
from kdkernels._torch.threads import share_rows
from kdkernels.options import Mode
from tests.support.budget import assert_within_budget
from tests.support.inputs import loss_and_gradients, make_case, true_linear_kd

V = 67
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3, 4, 6])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Threads of torch, and blocks of so few rows that they are shared out."""
    before = torch.get_num_threads()
    monkeypatch.setattr("kdkernels._torch.sizes.BLOCK_ELEMENTS", 4 * V)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_workers_divide_the_threads(count: int) -> None:
    assert worker_count(100, V, CPU) == {1: 1, 2: 2, 3: 3, 4: 4, 6: 3}[count]
    assert worker_count(4, V, CPU) == 1, "one block"
    assert worker_count(5, V, CPU) <= 5
    assert worker_count(1, 100 * V, CPU) == 1
    assert worker_count(100, V, torch.device("meta")) == 1


def test_each_row_once_on_threads_that_compute_alone(count: int) -> None:
    workers = worker_count(23, V, CPU)
    seen: list[tuple[slice, int, bool, str]] = []
    share_rows(
        lambda here: seen.append(
            (here, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name)
        ),
        23,
        workers,
    )
    assert sorted(row for here, *_ in seen for row in range(here.start, here.stop)) == list(range(23))
    if workers > 1:
        assert {inner for _, inner, _, _ in seen} == {count // workers}
        assert not any(grad for _, _, grad, _ in seen)
        assert all(name.startswith("kdkernels") for *_, name in seen)
    # Neither this thread nor one that starts later has lost its threads.
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == count and later == [count]


def test_an_error_of_one_share_reaches_the_caller_after_all_ended(count: int) -> None:
    workers = worker_count(20, V, CPU)
    done: list[int] = []

    def work(here: slice) -> None:
        if here.start == 0:
            raise ValueError("the first share")
        done.append(here.start)

    with pytest.raises(ValueError, match="the first share"):
        share_rows(work, 20, workers)
    assert len(done) == workers - 1


@pytest.mark.parametrize("mode", ["fast", "low_memory"])
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3), Decoupled(1.0, 2.0)], ids=repr)
def test_values_and_gradients(count: int, divergence: Divergence, mode: Mode) -> None:
    """Whole rows and tiles of the vocabulary."""
    case = make_case()
    options = {"divergence": divergence, "temperature": 2.5, "ce_weight": 0.5}
    truth = true_linear_kd(case, case.labels, **options)
    loss, *gradients = loss_and_gradients(case, case.labels, "torch", mode=mode, **options)
    assert_within_budget(loss, truth[1], "mean")
    for name, ours, exact in zip(("hidden", "weight", "bias"), gradients, truth[2:], strict=True):
        assert_within_budget(ours, exact, name)


def test_a_row_that_needs_its_maximum_in_one_share(count: int) -> None:
    student, teacher = torch.randn(23, V), torch.randn(23, V)
    student[20] += 1000
    exact = kd_loss(student.double(), teacher.double(), reduction="none", impl="reference")
    found = kd_loss(student, teacher, reduction="none", impl="torch")
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6)
    assert torch.equal(found.isfinite(), torch.ones(23, dtype=torch.bool))


def test_top_k_teachers(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(23, V, generator=generator)
    logprobs, ids = torch.randn(23, V, generator=generator).log_softmax(-1).topk(5)
    values = []
    for threads in (1, count):
        torch.set_num_threads(threads)
        own = logits.clone().requires_grad_()
        loss = kd_loss(own, TeacherTopK(logprobs, ids), impl="torch")
        loss.backward()
        assert own.grad is not None
        values.append((loss.detach(), own.grad))
    for one, several in zip(*values, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-7)


def test_inference_mode_and_logits_that_require_gradients(count: int) -> None:
    logits = torch.randn(23, V, requires_grad=True)
    teacher = torch.randn(23, V)
    wanted = kd_loss(logits, teacher, impl="reference")
    torch.testing.assert_close(kd_loss(logits, teacher, impl="torch"), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(kd_loss(logits * 1, teacher, impl="torch"), wanted.detach())


@pytest.mark.parametrize("count", [2], indirect=True)
def test_a_fork_makes_threads_of_its_own(count: int) -> None:
    """As a data loader's worker that computes a loss."""
    logits, teacher = torch.randn(23, V), torch.randn(23, V)
    kd_loss(logits, teacher, impl="torch")
    assert pools._pools
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's own threads are gone as well
            ended = 3 if pools._pools else 0
            share_rows(lambda here: None, 20, 1)
        except BaseException:
            ended = 4
        os._exit(ended)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
