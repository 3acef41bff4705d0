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
LINE_OF_A_CLASSIFIER = {
    "accuracy": "test accuracy {:.1%} [{:.1%}, {:.1%}]",
    "top3": "top-3 {:.1%}",
    "macro_f1": "macro F1 {:.3f}",
    "agreement": "agreement {:.1%}",
}
LINE_OF_A_MODEL = {
    "loss": "held-out loss {:.4f}",
    "perplexity": "perplexity {:.2f}",
    "divergence": "divergence {:.4f}",
    "agreement": "agreement {:.1%}",
    "accuracy": "masked tokens predicted {:.1%}",
    "name_accuracy": "exception names {:.1%}",
}
"""Metrics of the line that sums a run up, with their words."""
PACKAGES = ("kdkernels", "torch", "transformers", "tokenizers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Summary:
    """Everything measured of one run; dictionaries as they stand in summary.json."""

    name: str
    task: str
    method: str
    seed: int
    student: dict[str, Any]
    """architecture, parameters, bytes (of the folder), and latency_ms (one row, float32) of a classifier"""
    valid: dict[str, Any]
    """metrics of the rows that chose the best checkpoint"""
    test: dict[str, Any] | None
    """metrics of rows that nothing was chosen by; None where the data has no such rows"""
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

    @property
    def metrics(self) -> dict[str, Any]:
        """Those of the test rows, or of the held-out rows where there are none."""
        return self.valid if self.test is None else self.test

    def line(self) -> str:
        """The run in one line."""
        metrics = self.metrics
        words = [
            text.format(metrics[name], *metrics.get(f"{name}_interval", ()))
            for name, text in (
                LINE_OF_A_CLASSIFIER if "accuracy_interval" in metrics else LINE_OF_A_MODEL
            ).items()
            if name in metrics
        ]
        words.append(f"{self.student['parameters']:,} parameters")
        if "latency_ms" in self.student:
            words.append(f"{self.student['latency_ms']:.1f} ms a row")
        words.append(f"{self.training['tokens_per_second']:.0f} tokens/s")
        words.append(f"trained in {self.training['seconds']:.0f} s")
        return f"{self.name}: {', '.join(words)}"


def installed_versions() -> dict[str, str]:
    """Python and the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found
