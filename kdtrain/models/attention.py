"""The inputs of attention: queries, keys and values of chosen layers, kept while a model runs.

with attention_inputs(model, (6,)) as kept:      # kept[6].query, .key, .value as they enter the attention
    hidden, _ = hidden_states(model, input_ids, position_ids)
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdtrain.models.heads import decoder_layers

Relation = Literal["attention", "queries", "keys", "values"]


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of the attention of one layer: after rotations and norms, before keys are repeated for grouped queries."""

    query: Tensor
    """(B, H, N, d)"""
    key: Tensor
    """(B, H_kv, N, d)"""
    value: Tensor
    """(B, H_kv, N, d_v)"""
    scaling: float
    """before the softmax: scaling * query @ key.T"""

    def of(self, kind: Relation) -> tuple[Tensor, Tensor | None]:
        """The two sides of a relation, (B, H, N, d) each, so that the scores are their products / sqrt(d).

        Values, keys or queries are compared with themselves: the second side is None.
        """
        if kind == "attention":
            factor = self.scaling * math.sqrt(self.query.shape[-1])
            query = self.query if math.isclose(factor, 1.0) else self.query * factor
            return query, self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        return {"queries": self.query, "keys": self.key, "values": self.value}[kind], None


@contextmanager
def attention_inputs(
    model: PreTrainedModel | None, layers: tuple[int, ...]
) -> Iterator[dict[int, AttentionInputs]]:
    """Keep the inputs of the attention of the given layers (1 is the first) while the model runs.

    The model's own attention function is called as always; only references are kept. A model that does not use the
    attention interface of transformers leaves the dictionary empty.
    """
    kept: dict[int, AttentionInputs] = {}
    if model is None or not layers:
        yield kept
        return
    blocks = list(decoder_layers(model))
    wanted = {id(module): number for number in layers for module in blocks[number - 1].modules()}
    name = str(model.config._attn_implementation)
    plain = ALL_ATTENTION_FUNCTIONS.get(name)

    def keep(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
    ) -> Any:
        if id(module) in wanted:
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            kept[wanted[id(module)]] = AttentionInputs(query, key, value, scaling)
        # Every family has an eager attention of its own, which the interface does not list.
        function = plain or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, *others, **options)

    # Layers that are recomputed in backward meet the plain function again.
    ALL_ATTENTION_FUNCTIONS[name] = keep
    try:
        yield kept
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if plain is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not plain:  # registered by the user
            ALL_ATTENTION_FUNCTIONS[name] = plain
