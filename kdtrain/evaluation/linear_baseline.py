"""The floor: a bag-of-tokens linear classifier. A model that does not beat it has learned nothing about code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import Tensor

AROUND = 600
"""Characters kept around the focus marker in the second variant."""


def bag_of_tokens(
    train: Sequence[str], labels: Tensor, test: Sequence[str], focus: str | None
) -> dict[str, Tensor]:
    """Scores (test rows, C) of linear support vector machines over TF-IDF of token counts.

    One variant sees the whole text, one the 600 characters around the marker where there is one.
    """
    variants = {"whole function": (list(train), list(test))}
    if focus is not None:
        variants[f"{AROUND} characters"] = (
            [around(text, focus) for text in train],
            [around(text, focus) for text in test],
        )
    scores = {}
    for name, (train_texts, test_texts) in variants.items():
        classifier = make_pipeline(
            TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", min_df=2, sublinear_tf=True), LinearSVC(C=0.3)
        )
        classifier.fit(train_texts, labels.numpy())
        known = torch.from_numpy(np.asarray(classifier.decision_function(test_texts), dtype=np.float32))
        if known.ndim == 1:  # two classes: one score, positive for the second
            known = torch.stack([-known, known], dim=1)
        scores[name] = torch.full((len(test_texts), int(labels.max()) + 1), -torch.inf)
        scores[name][:, torch.from_numpy(classifier.classes_)] = known
    return scores


def around(text: str, focus: str) -> str:
    """The 600 characters of the text that the marker is in the middle of."""
    middle = max(text.find(focus), 0)
    return text[max(0, middle - AROUND // 2) : middle + AROUND // 2]
