"""Losses on the states of every token of a text; methods at and fsp start from it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Needs, Pairs
from kdtrain.methods.kd import KDOptions, LogitTerms
from kdtrain.methods.layers import layer_pairs
from kdtrain.models.loading import Shape
from kdtrain.outputs import Features


class TokenStatesOptions(KDOptions):
    """The terms of kd, and the states of the tokens of mapped layers."""

    layer_map: Pairs = Field(
        default=(),
        description="pairs [student layer, teacher layer]; by default every student layer, spread evenly over those of "
        "the teacher",
    )


class TokenStates(LogitTerms):
    """The terms of kd, and a loss on the states of every token."""

    # On packed rows every document would need a map of its own.
    tasks = frozenset({"classification"})

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        if not teacher.embeddings:
            raise KdtrainError(
                f"method {options.name} reads the teacher token by token and needs a Transformer teacher; choose another "
                "teacher.path"
            )
        self.pairs = layer_pairs(options.layer_map, student.layers, teacher.layers)

    def needs(self) -> Needs:
        """States of every token."""
        return Needs(tokens=self.pairs)

    @staticmethod
    def valid(side: Features, layer: int) -> Tensor:
        """(S, N, D): the states of a layer, 0 at padding."""
        assert side.token_mask is not None
        return side.tokens[layer].masked_fill(~side.token_mask.unsqueeze(2), 0.0)
