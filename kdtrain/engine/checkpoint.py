"""Checkpoints: folders of safetensors and JSON that appear whole, hold everything a run needs to go on, and nothing else."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdtrain.engine.full_state import load_optimizer_state, load_state
from kdtrain.files import atomic_folder, write_json, write_tensors


@dataclass
class Position:
    """Where a run stands. The order of the rows is a function of seed and epoch, so the step is all of the data position."""

    step: int = 0
    tokens: int = 0
    """student tokens trained on"""
    seconds: float = 0.0
    """time spent in training steps"""
    best_step: int = 0
    best_value: float | None = None
    """of the metric that chooses the best checkpoint; larger is better"""


def save_checkpoint(
    folder: Path,
    position: Position,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    scheduler: Any,
    scaler: Any,
    tensors: dict[str, Tensor],
) -> None:
    """Write `step-N` with the state of everything, then remove what it supersedes.

    Args:
        model, optimizer: their states as `sharding.whole_state` gives them.
        tensors: whatever else must come back bit by bit (random state, running sums).
    """
    with atomic_folder(folder / f"step-{position.step:07d}") as path:
        write_tensors(path / "model.safetensors", model)
        flat = {
            f"{i}.{name}": value for i, entry in optimizer["state"].items() for name, value in entry.items()
        }
        write_tensors(path / "optimizer.safetensors", flat)
        write_tensors(path / "tensors.safetensors", tensors)
        write_json(
            path / "state.json",
            {
                "position": asdict(position),
                "optimizer": optimizer["param_groups"],
                "scheduler": scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        )
    keep = {f"step-{position.step:07d}", f"best-{position.best_step:07d}"}
    for old in [*folder.glob("step-*"), *folder.glob("best-*")]:
        if old.name not in keep:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any
) -> tuple[Position, dict[str, Tensor]] | None:
    """Bring back the latest checkpoint; None when there is none."""
    path = latest_checkpoint(folder)
    if path is None:
        return None
    content = json.loads((path / "state.json").read_text())
    load_state(model, load_file(path / "model.safetensors"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    load_optimizer_state(optimizer, {"state": state, "param_groups": content["optimizer"]})
    scheduler.load_state_dict(content["scheduler"])
    if scaler is not None:
        scaler.load_state_dict(content["scaler"])
    return Position(**content["position"]), load_file(path / "tensors.safetensors")


def latest_checkpoint(folder: Path) -> Path | None:
    """The `step-N` folder with the largest N."""
    return max(folder.glob("step-*"), default=None)


def save_best(folder: Path, step: int, model: dict[str, Tensor]) -> None:
    """Keep the weights of the best evaluation so far."""
    with atomic_folder(folder / f"best-{step:07d}") as path:
        write_tensors(path / "model.safetensors", model)


def read_best(folder: Path, step: int) -> dict[str, Tensor]:
    """Those weights."""
    return load_file(folder / f"best-{step:07d}" / "model.safetensors")
