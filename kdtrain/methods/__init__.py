"""The methods, one file each; a new one is a file and a row in this table."""

from kdtrain.errors import KdtrainError
from kdtrain.methods.ckd import ContextualDistillation
from kdtrain.methods.dist import CorrelationDistillation
from kdtrain.methods.ft import FineTuning
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.kd_features import FeatureDistillation
from kdtrain.methods.pkd import PatientDistillation
from kdtrain.tasks.classification.objective import Method

METHODS: dict[str, type[Method]] = {
    "ft": FineTuning,
    "kd": LogitDistillation,
    "kd_features": FeatureDistillation,
    "dist": CorrelationDistillation,
    "pkd": PatientDistillation,
    "ckd": ContextualDistillation,
}


def method_class(name: str) -> type[Method]:
    """The class behind a recipe's `method.name`."""
    if name not in METHODS:
        raise KdtrainError(f"method.name must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
