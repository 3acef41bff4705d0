"""Running means of named values, kept on the device between two lines of metrics.jsonl."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class RunningMeans:
    """Sums of terms, loss and gradient norm over steps; of this process alone until they are reduced.

    Names are those of the first step; a checkpoint holds the sums in their order.
    """

    def __init__(self, device: torch.device, sums: Tensor | None = None) -> None:
        self.device = device
        self.names: tuple[str, ...] = ()
        self.sums = sums
        self._step: dict[tuple[str, ...], Tensor] = {}

    def begin_step(self) -> None:
        """Open a step."""
        self._step = {}

    def add(self, loss: Tensor, values: dict[str, Tensor], *, scale: float, divisor: int) -> None:
        """Add one micro-batch to the step: the loss, a share of that of the whole batch, and the sums of its terms.

        Args:
            scale: of the micro-batch, divided by the number of processes.
        """
        key = tuple(values)
        new = torch.stack([*values.values(), loss.detach() * divisor]) * (scale / divisor)
        self._step[key] = self._step[key] + new if key in self._step else new

    def end_step(self, norm: Tensor | None, logged: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """Close the step with what every process knows: its gradient norm, and values that a method logs."""
        names, terms = self._terms()
        zero = torch.zeros_like(terms[-1])
        known = [value.to(zero) / accelerator.num_processes for value in logged.values()]
        new = torch.stack([*terms[:-1], *known, terms[-1], zero if norm is None else norm.to(zero)])
        self.names = (*(f"loss/{name}" for name in names[:-1]), *logged, "loss", "grad_norm")
        self.sums = new if self.sums is None else self.sums + new

    def step_values(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The terms and the loss of the step over all processes, 0-D each; all processes take part."""
        names, terms = self._terms()
        whole: Tensor = accelerator.reduce(torch.stack(terms), "sum")  # type: ignore[assignment]
        return dict(zip(names, whole.unbind(), strict=True))

    def _terms(self) -> tuple[list[str], list[Tensor]]:
        """Names and values of the terms of the step, then of the loss."""
        names = [name for key in self._step for name in key]
        parts = [part.unbind() for part in self._step.values()]
        terms = [value for part in parts for value in part[:-1]]
        return [*names, "loss"], [*terms, torch.stack([part[-1] for part in parts]).sum()]

    def means(self, accelerator: Accelerator, steps: int) -> dict[str, float]:
        """Mean over steps and processes since the last call; all processes take part, and the host waits for the device."""
        assert self.sums is not None
        *sums, norm = accelerator.reduce(self.sums, "sum").div(steps).tolist()  # type: ignore[union-attr]
        self.sums = torch.zeros_like(self.sums)
        return {
            **dict(zip(self.names[:-1], sums, strict=True)),
            "grad_norm": norm / accelerator.num_processes,
        }
