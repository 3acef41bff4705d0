"""Dynamic KD, data selection (Li et al., EMNLP 2021, arXiv 2109.11295): the teacher runs on the informative rows only."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Step
from kdtrain.methods.kd import KDOptions, LogitTerms
from kdtrain.outputs import Batch, LogitOutputs, Outputs
from kdtrain.recipe.base import Number


class DynamicSelection(LogitTerms):
    """The terms of kd on the `ratio` of every batch in which the student is least certain (section 4 of the paper).

    The student scores the batch first, without a graph and before any teacher is asked:
    entropy of its probabilities, margin between the two largest (low first), or one minus the largest. `random` draws by
    the number of the step, the paper's baseline.
    """

    # Scores are of rows, by the probabilities of their classes.
    tasks = frozenset({"classification"})

    class Options(KDOptions):
        """Soft labels for the rows that the student is least certain of."""

        name: Literal["dynamic_selection"] = "dynamic_selection"
        score: Literal["entropy", "margin", "confidence", "random"] = Field(
            default="entropy", description="what a row is selected by"
        )
        ratio: Annotated[Number, Field(gt=0, le=1)] = Field(
            default=0.5, description="share of the rows of a batch that are trained on"
        )

    def score(self, step: Step, batch: Batch, student: Outputs) -> Tensor:
        """(B,) float32, larger where the student is less certain."""
        assert isinstance(student, LogitOutputs)
        return uncertainty(student.logits, self.options.score)

    def select(self, step: Step, rows: Tensor, scores: Tensor) -> Tensor:
        """The rows with the largest scores, in the order of the batch."""
        count = max(1, round(self.options.ratio * len(rows)))
        if self.options.score == "random":
            generator = torch.Generator().manual_seed(step.number)
            places = torch.randperm(len(rows), generator=generator)[:count]
        else:
            places = scores.argsort(descending=True, stable=True)[:count]
        return rows[places.sort().values]


def uncertainty(logits: Tensor, score: str) -> Tensor:
    """How uncertain a classifier is of each row of (B, C) logits, (B,)."""
    logs = logits.log_softmax(dim=1)
    if score == "margin":
        best = logs.exp().topk(2, dim=1).values
        return best[:, 1] - best[:, 0]
    if score == "confidence":
        return 1 - logs.exp().amax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)
