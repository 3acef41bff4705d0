"""What a finished run leaves to be read: summary.json."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from kdtrain.checksums import check_sealed, seal
from kdtrain.files import write_json

FILE = "summary.json"
OUTPUTS = ("student", "adapter", "projection.safetensors", "predictions", FILE)
"""All that a run leaves and that is read again, by its name in the run's folder."""
PACKAGES = ("kdkernels", "torch", "transformers", "tokenizers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Summary:
    """Everything measured of one run; dictionaries as they stand in summary.json."""

    name: str
    method: str
    seed: int
    student: dict[str, Any]
    """architecture, parameters, bytes (of the folder), latency_ms (one row, float32)"""
    test: dict[str, Any]
    """accuracy, accuracy_interval, top3, macro_f1, loss, agreement (with a teacher), rows"""
    valid: dict[str, Any]
    teacher: dict[str, Any] | None
    """path, parameters and its own test metrics"""
    training: dict[str, Any]
    """steps, best_step, seconds, tokens, tokens_per_second, peak_memory_bytes, threads"""
    data: dict[str, Any]
    """name, fingerprint, rows of each split"""
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write `folder`/summary.json and the checksums of all that the run leaves; from then on it is finished."""
        write_json(folder / FILE, asdict(self))
        seal(folder, OUTPUTS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/summary.json.

        Raises:
            KdtrainError: it is missing or damaged.
        """
        check_sealed(folder, "run the training again, or measure another run", FILE)
        return cls(**json.loads((folder / FILE).read_text()))

    def line(self) -> str:
        """The run in one line."""
        low, high = self.test["accuracy_interval"]
        agreement = f", agreement {self.test['agreement']:.1%}" if "agreement" in self.test else ""
        return (
            f"{self.name}: test accuracy {self.test['accuracy']:.1%} [{low:.1%}, {high:.1%}], top-3 {self.test['top3']:.1%}, "
            f"macro F1 {self.test['macro_f1']:.3f}{agreement}, {self.student['parameters']:,} parameters, "
            f"{self.student['latency_ms']:.1f} ms a row, trained in {self.training['seconds']:.0f} s"
        )


def installed_versions() -> dict[str, str]:
    """Python and the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found
