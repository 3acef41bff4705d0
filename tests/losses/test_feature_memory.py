"""What the losses between inner layers hold: no tensor grows with what their docstrings say is never kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import cosine_loss, projection_mse, relation_kl
from tests.support.inputs import DEVICE


class Largest(TorchDispatchMode):
    """Records the most elements that a result of any operation holds by itself, views left out."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {side.untyped_storage().data_ptr() for side in args if isinstance(side, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return result


def largest(loss: Callable[[], Tensor]) -> int:
    """Elements of the largest tensor that forward and backward make."""
    with Largest() as mode:
        loss().backward()
    return mode.elements


@pytest.mark.parametrize("loss", [projection_mse, cosine_loss])
def test_projections_hold_one_chunk(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.features import distance

    monkeypatch.setattr(distance, "CPU_CHUNK_BYTES", 4 * 1024)
    monkeypatch.setattr(distance, "MIN_CPU_CHUNK_ROWS", 1)
    weight = torch.randn(64, 4)  # on a CPU: a GPU's chunk is as large as its products want it
    for count in (64, 1024):
        student = torch.randn(count, 4, requires_grad=True)
        teacher = torch.randn(count, 64)
        # The gradient of the student has 4 elements a row, the projection would have 64.
        assert largest(lambda student=student, teacher=teacher: loss(student, teacher, weight)) <= max(
            4 * count, 1024
        )


@pytest.mark.parametrize("causal", [False, True])
def test_relations_hold_no_map(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels._torch import relations

    monkeypatch.setattr(relations, "CHUNK_ELEMENTS", 2048)
    for length in (64, 256):
        student = torch.randn(1, length, 16, device=DEVICE, requires_grad=True)
        teacher = torch.randn(1, length, 24, device=DEVICE)
        held = largest(
            lambda student=student, teacher=teacher: relation_kl(
                student, teacher, heads=2, causal=causal, impl="torch"
            )
        )
        # The row work's scratch is a few times the chunk; the maps of 256 tokens have 131,072 numbers a side.
        assert held <= max(16 * 2048, 24 * length)
