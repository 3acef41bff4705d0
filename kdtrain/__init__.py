"""A lean loop that distils code models with the losses of kdkernels."""

from kdtrain.bigru import register
from kdtrain.errors import KdtrainError

register()  # from here on AutoModelForSequenceClassification loads BiGRU students

__all__ = ["KdtrainError"]
