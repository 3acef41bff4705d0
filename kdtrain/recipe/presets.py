"""Named values: the students and methods of arXiv 2508.15423.

A preset fills fields that a recipe leaves out; what a recipe says wins. `recipe.yaml` of a run holds the result.

What is the study's: everything under STUDY, and the BiGRU shapes and vocabulary sizes. What is not: the study did not
release its RoBERTa shapes, so those here are chosen to have the nominal size; its contextual method compared padding as
well, which no preset brings back (no loss here reads padding); it clipped nothing by mistake, and here 1.0 clips.
"""

from typing import Any

from kdtrain.errors import KdtrainError


def _roberta(vocab_size: int, hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architecture": "roberta",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "heads": heads,
        "intermediate_size": 4 * hidden_size,
        "max_length": 512,
    }


def _bigru(vocab_size: int, hidden_size: int, layers: int) -> dict[str, Any]:
    return {
        "architecture": "bigru",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "max_length": 512,
    }


STUDENTS: dict[str, dict[str, Any]] = {
    # Depth divides 12, so that every layer has a teacher layer of its own.
    "roberta-124M": _roberta(50_000, 768, 12, 12),
    "roberta-30M": _roberta(20_000, 512, 6, 8),
    "roberta-7M": _roberta(5_000, 320, 4, 8),
    "roberta-1.5M": _roberta(2_000, 168, 3, 4),
    "roberta-0.6M": _roberta(1_000, 128, 2, 4),
    "bigru-124M": _bigru(50_000, 768, 8),
    "bigru-30M": _bigru(20_000, 448, 6),
    "bigru-7M": _bigru(5_000, 320, 3),
    "bigru-1.5M": _bigru(2_000, 176, 2),
    "bigru-0.6M": _bigru(1_000, 112, 2),
}
"""Fields of `student` by name."""

_TRAINING = {
    "num_train_epochs": 5,
    "batch_size": 32,
    "weight_decay": 0.0,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
}
# The study's divergence has no factor T squared; here it always has, so the weight takes it back: 0.01 = 1 / 10^2.
STUDY: dict[str, dict[str, dict[str, Any]]] = {
    "ft": {"method": {"ce_weight": 1.0}, "training": {**_TRAINING, "learning_rate": 3e-4}},
    "kd": {
        "method": {"temperature": 10.0, "kd_weight": 0.01, "ce_weight": 0.0},
        "training": {**_TRAINING, "learning_rate": 3e-4},
    },
    "dist": {
        "method": {"temperature": 10.0, "inter_weight": 0.01, "intra_weight": 0.01, "ce_weight": 0.0},
        "training": {**_TRAINING, "learning_rate": 1e-4},
    },
    "pkd": {
        "method": {"temperature": 10.0, "kd_weight": 1.0, "ce_weight": 0.0, "feature_weight": 10.0},
        "training": {**_TRAINING, "learning_rate": 1e-4},
    },
    "ckd": {
        "method": {
            "temperature": 3.0,
            "kd_weight": 1.0,
            "ce_weight": 0.0,
            "feature_weight": 10.0,
            "layer_weight": 10.0,
            "window": 10,
        },
        "training": {**_TRAINING, "learning_rate": 3e-5, "batch_size": 16},
    },
}
"""Fields of `method` and `training` by method under `method.preset: study`."""


def with_student_preset(content: Any) -> Any:
    """A `student:` section with the fields that its preset fills; a wrong preset is left for the section to refuse."""
    if not isinstance(content, dict) or not isinstance(content.get("preset"), str):
        return content
    return {**STUDENTS.get(content["preset"], {}), **content}


def with_method_preset(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose `method.preset` is replaced by the fields that it fills, in `method` and in `training`.

    Raises:
        KdtrainError: a preset that does not exist, or that has no values for the method.
    """
    method = content.get("method")
    if not isinstance(method, dict) or "preset" not in method:
        return content
    preset, name = method["preset"], method.get("name")
    if preset != "study":
        raise KdtrainError(f"method.preset must be study, got {preset!r}")
    if not isinstance(name, str) or name not in STUDY:
        raise KdtrainError(f"method.preset study has values for the methods {', '.join(STUDY)}, got {name!r}")
    filled = {
        **content,
        "method": {**STUDY[name]["method"], **{key: method[key] for key in method if key != "preset"}},
    }
    training = content.get("training") or {}
    if isinstance(training, dict):
        filled["training"] = {**STUDY[name]["training"], **training}
    return filled
