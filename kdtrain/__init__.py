"""A lean loop that distils code models with the losses of kdkernels."""

from kdtrain.errors import KdtrainError
from kdtrain.models.registration import register_models

register_models()  # so that AutoModelForSequenceClassification loads BiGRU students

__all__ = ["KdtrainError"]
