"""What can be measured: a kind of case, its inputs, who takes part, and the exact answer that everybody is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Step = Callable[[], Tensor]


class CannotRun(Exception):
    """Why a contender does not take part, in one sentence that the table shows."""


class AnyCase(Protocol):
    """One shape of an operation. A case travels to the processes that measure it as a dictionary of its fields."""

    @property
    def family(self) -> str:
        """The key of its operation in benchmarks.registry."""
        ...

    @property
    def name(self) -> str:
        """Its title in tables: operation and every size."""
        ...

    @property
    def device(self) -> str:
        """cpu or cuda"""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Its fields."""
        ...


@dataclass(frozen=True)
class Operation:
    """One kind of thing to measure."""

    case: Callable[..., AnyCase]
    make_inputs: Callable[[Any], Any]
    contenders: Mapping[str, Callable[[Any, Any], Step]]
    """from a case and its inputs to the step that is timed, or CannotRun; a step gives the loss it computed"""
    leaves: Callable[[Any, Any], Mapping[str, Tensor]]
    """the student's tensors whose gradients a step leaves behind, the hidden states first"""
    labels: Mapping[str, str]
    """of the contenders, in tables"""
    tests: tuple[str, ...]
    """test files without which no figure of this operation is worth anything"""
    truth: Callable[[Any, Any], dict[str, Tensor]] | None = None
    """`loss` and the gradient of every leaf in fp64; None where a step is no single number that could be checked"""
    floor: str | None = "products"
    """the contender that the last column of a table compares with: what nothing exact is faster than"""
    floor_name: str = "x floor"
    """the heading of that column"""
    tokens: Callable[[Any], int] | None = None
    """tokens of a step, where their rate is what people ask for"""
    yardsticks: frozenset[str] = field(default_factory=frozenset)
    """contenders that compute no loss, so that they have no error to show"""


def with_backward(loss_of: Callable[[], Tensor]) -> Step:
    """A step out of a loss: forward and backward."""

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return step


def training_step(module: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """What `kdtrain.loop` does between two lines of its log, around a loss: backward, clip, move the weights."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    with_gradients = with_backward(loss_of)

    def step() -> Tensor:
        loss = with_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def need_gpu(case: AnyCase) -> None:
    """For peers that are Triton kernels and nothing else."""
    if case.device != "cuda":
        raise CannotRun("its Triton kernels need a GPU")
