"""Checkpoints: folders of safetensors and JSON that appear whole, hold everything a run needs to resume, and nothing else.

Each carries checksums that are verified when it is read. The last two are kept, with the weights of their best evaluation: where
the newest is damaged, the run resumes from the one before.
"""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdtrain.checksums import check_sealed, seal
from kdtrain.engine.full_state import load_optimizer_state, load_state
from kdtrain.errors import KdtrainError
from kdtrain.files import atomic_folder, write_json, write_tensors

STATE = "state.json"
WEIGHTS = "model.safetensors"
NAME = re.compile(r"(step|best)-(\d{7,})")


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
    waited: int = 0
    """evaluations since the best one"""
    best_metrics: dict[str, float] = field(default_factory=dict)
    """all of that evaluation"""
    evaluated_step: int = 0
    """the last one that was evaluated"""


def save_checkpoint(
    folder: Path,
    position: Position,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    scheduler: Any,
    scaler: Any,
    tensors: dict[str, Tensor],
    run: str,
    keep: int = 2,
) -> None:
    """Write `step-N` with the state of everything, then remove what it supersedes.

    Args:
        run: which run this is, see `run_folder.recipe_hash`.
        model, optimizer: their states as `sharding.whole_state` gives them.
        tensors: whatever else must come back bit by bit (random state, running sums).
        keep: how many checkpoints stay.
    """
    with atomic_folder(folder / f"step-{position.step:07d}") as path:
        write_tensors(path / WEIGHTS, model)
        flat = {
            f"{i}.{name}": value for i, entry in optimizer["state"].items() for name, value in entry.items()
        }
        write_tensors(path / "optimizer.safetensors", flat)
        write_tensors(path / "tensors.safetensors", tensors)
        write_json(
            path / STATE,
            {
                "run": run,
                "position": asdict(position),
                "optimizer": optimizer["param_groups"],
                "scheduler": scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        )
        seal(path)
    steps = [step for step in steps_of(folder) if step <= position.step][-keep:]
    kept = {name_of("step", step) for step in steps}
    for step in steps:
        with suppress(OSError, ValueError, KeyError):  # the one before may be damaged by now
            kept.add(name_of("best", _best_step(folder / name_of("step", step))))
    for old in folder.iterdir():
        if NAME.fullmatch(old.name) and old.is_dir() and old.name not in kept:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: Any,
    *,
    run: str,
    tell: Callable[[str], None],
) -> tuple[Position, dict[str, Tensor]] | None:
    """Restore the latest checkpoint that is whole; None when there is none at all.

    Args:
        run: which run resumes, see `run_folder.recipe_hash`.
        tell: where a damaged checkpoint is reported.

    Raises:
        KdtrainError: every checkpoint is damaged, or the checkpoint is another run's.
    """
    path = _latest_whole(folder, tell)
    if path is None:
        return None
    content = json.loads((path / STATE).read_text())
    if content["run"] != run:
        raise KdtrainError(
            f"{path} was written by a run with another recipe; choose another output, or delete {folder} to start over"
        )
    load_state(model, load_file(path / WEIGHTS))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    load_optimizer_state(optimizer, {"state": state, "param_groups": content["optimizer"]})
    scheduler.load_state_dict(content["scheduler"])
    if scaler is not None:
        scaler.load_state_dict(content["scaler"])
    return Position(**content["position"]), load_file(path / "tensors.safetensors")


def steps_of(folder: Path, kind: str = "step") -> list[int]:
    """The steps of which a folder holds checkpoints, in order. Folders of any other name are not looked at."""
    found = (
        NAME.fullmatch(one.name) for one in (folder.iterdir() if folder.is_dir() else ()) if one.is_dir()
    )
    return sorted(int(match[2]) for match in found if match is not None and match[1] == kind)


def name_of(kind: str, step: int) -> str:
    """How the folder of a checkpoint (`step`) or of the weights of an evaluation (`best`) is called."""
    return f"{kind}-{step:07d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The `step-N` folder with the largest N."""
    steps = steps_of(folder)
    return folder / name_of("step", steps[-1]) if steps else None


def save_best(folder: Path, step: int, model: dict[str, Tensor]) -> None:
    """Keep the weights of the best evaluation so far."""
    with atomic_folder(folder / name_of("best", step)) as path:
        write_tensors(path / WEIGHTS, model)
        seal(path)


def read_best(folder: Path, step: int) -> dict[str, Tensor]:
    """Those weights.

    Raises:
        KdtrainError: they are damaged.
    """
    path = folder / name_of("best", step)
    check_sealed(path, "run the same command again: it resumes from the last checkpoint that is whole")
    return load_file(path / WEIGHTS)


def _latest_whole(folder: Path, tell: Callable[[str], None]) -> Path | None:
    reason = ""
    for step in reversed(steps_of(folder)):
        path = folder / name_of("step", step)
        try:
            check_sealed(path, "an older checkpoint is used")
            best = _best_step(path)
            if best:
                check_sealed(folder / name_of("best", best), "an older checkpoint is used")
        except KdtrainError as error:
            reason = str(error)
            tell(reason)
            continue
        return path
    if reason:
        raise KdtrainError(
            f"no checkpoint in {folder} is whole ({reason.rpartition('; ')[0]}); delete {folder} and the run starts over"
        )
    return None


def _best_step(path: Path) -> int:
    return int(json.loads((path / STATE).read_text())["position"]["best_step"])
