"""How good and how faithful a classifier is: measured on its logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from kdtrain.evaluation.measure import bootstrap_interval, median_ms
from kdtrain.files import write_tensors
from kdtrain.tasks.classification.labelled import LabelledRows
from kdtrain.tasks.classification.pairs import Rows


def classification_metrics(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None
) -> dict[str, float]:
    """Accuracy, top-3 accuracy, macro F1 over the classes that occur, cross-entropy, and agreement with the teacher.

    With two classes also f1, that of the second.

    Args:
        logits: (rows, C) float32.
        labels: (rows,) int64.
        teacher_logits: (rows, C); agreement is the share of rows in which both name the same class.
    """
    predicted = logits.argmax(dim=1)
    top = logits.topk(min(3, logits.shape[1]), dim=1).indices
    metrics = {
        "accuracy": float((predicted == labels).double().mean()),
        "top3": float((top == labels[:, None]).any(dim=1).double().mean()),
        "macro_f1": float(f1_score(labels.numpy(), predicted.numpy(), average="macro")),
        "loss": float(nn.functional.cross_entropy(logits.double(), labels)),
    }
    if logits.shape[1] == 2:
        metrics["f1"] = float(f1_score(labels.numpy(), predicted.numpy()))
    if teacher_logits is not None:
        metrics["agreement"] = float((predicted == teacher_logits.argmax(dim=1)).double().mean())
    return metrics


def report(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> dict[str, Any]:
    """The metrics of one split with the bootstrap interval of the accuracy."""
    correct = (logits.argmax(dim=1) == labels).numpy().astype(np.float64)
    return {
        **classification_metrics(logits, labels, teacher_logits),
        "accuracy_interval": list(bootstrap_interval(correct)),
        "rows": len(labels),
    }


def latency_ms(model: nn.Module, rows: Rows, *, count: int = 100) -> float:
    """Median milliseconds of one forward pass of one row, over `count` rows spread over the split, in float32."""
    model.eval()
    device = next(model.parameters()).device
    chosen = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()
    batches = [tuple(tensor.to(device) for tensor in rows.batch(index[None])) for index in chosen]
    return median_ms(lambda batch: model(input_ids=batch[0], attention_mask=batch[1]), batches, device)


def save_predictions(path: Path, logits: Tensor, split: LabelledRows) -> None:
    """Keep logits and labels, for paired comparisons of runs, and the digest of their texts."""
    tensors = {"logits": logits, "labels": split.labels}
    if split.teacher_logits is not None:
        tensors["teacher_logits"] = split.teacher_logits
    write_tensors(path, tensors, {"texts": split.digest})
