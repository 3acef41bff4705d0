"""Running means of named values, kept on the device between two lines of metrics.jsonl."""

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

    def add(self, loss: Tensor, values: dict[str, Tensor], *, scale: float, divisor: int) -> None:
        """Add one micro-batch to the step: the loss, a share of that of the whole batch, and the sums of its terms.

        Args:
            scale: of the micro-batch, divided by the number of processes.
        """
        key = tuple(values)
        new = torch.stack([*values.values(), loss.detach() * divisor]) * (scale / divisor)
        self._step[key] = self._step[key] + new if key in self._step else new

    def end_step(self, norm: Tensor | None) -> Tensor:
        """Close the step with its gradient norm, which every process knows; return its values, as `names`."""
        parts = list(self._step.values())
        loss = torch.stack([part[-1] for part in parts]).sum()
        last = torch.stack([loss, torch.zeros_like(loss) if norm is None else norm.to(loss)])
        new = torch.cat([*(part[:-1] for part in parts), last])
        self.names = (*(name for key in self._step for name in key), "loss", "grad_norm")
        self.sums = new if self.sums is None else self.sums + new
        self._step = {}
        return new

    def step_values(self, values: Tensor, accelerator: Accelerator) -> dict[str, Tensor]:
        """The terms and the loss of one step over all processes, 0-D each; all processes take part."""
        whole: Tensor = accelerator.reduce(values, "sum")  # type: ignore[assignment]
        return dict(zip(self.names[:-1], whole[:-1].unbind(), strict=True))

    def means(self, accelerator: Accelerator, steps: int) -> dict[str, float]:
        """Mean over steps and processes since the last call; all processes take part, and the host waits for the device."""
        assert self.sums is not None
        *sums, norm = accelerator.reduce(self.sums, "sum").div(steps).tolist()  # type: ignore[union-attr]
        self.sums = torch.zeros_like(self.sums)
        return {
            **dict(zip(self.names[:-1], sums, strict=True)),
            "grad_norm": norm / accelerator.num_processes,
        }
