"""Linear baselines: support vector machines over counts of tokens, and of tokens and their pairs.

A model that does not beat them has learned nothing about code that counting does not tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import Tensor

AROUND = {1: 600, 2: 300}
"""Characters kept around the focus marker, by the longest run of tokens that is counted."""


def linear_baselines(
    train: Sequence[str], labels: Tensor, test: Sequence[str], focus: str | None
) -> dict[str, Tensor]:
    """Scores (test rows, C) of linear support vector machines over TF-IDF of token counts, by name.

    Without a marker all see the whole text: single tokens, then tokens and pairs. With one there are three: single tokens of the
    whole text and of 600 characters around the marker, and tokens and pairs of 300.
    """
    scores = {"tokens, whole function": _scores(train, labels, test, 1)}
    if focus is None:
        scores["tokens and pairs, whole function"] = _scores(train, labels, test, 2)
        return scores
    for longest, characters in AROUND.items():
        kind = "tokens" if longest == 1 else "tokens and pairs"
        near = [[around(text, focus, characters) for text in texts] for texts in (train, test)]
        scores[f"{kind}, {characters} characters"] = _scores(near[0], labels, near[1], longest)
    return scores


def around(text: str, focus: str, characters: int) -> str:
    """The characters of the text that the marker is in the middle of."""
    middle = max(text.find(focus), 0)
    return text[max(0, middle - characters // 2) : middle + characters // 2]


def _scores(train: Sequence[str], labels: Tensor, test: Sequence[str], longest: int) -> Tensor:
    tokens = TfidfVectorizer(
        token_pattern=r"\w+|[^\w\s]", min_df=2, sublinear_tf=True, ngram_range=(1, longest)
    )
    classifier = make_pipeline(tokens, LinearSVC(C=0.3))
    classifier.fit(list(train), labels.numpy())
    known = torch.from_numpy(np.asarray(classifier.decision_function(list(test)), dtype=np.float32))
    if known.ndim == 1:  # two classes: one score, positive for the second
        known = torch.stack([-known, known], dim=1)
    scores = torch.full((len(test), int(labels.max()) + 1), -torch.inf)
    scores[:, torch.from_numpy(classifier.classes_)] = known
    return scores
