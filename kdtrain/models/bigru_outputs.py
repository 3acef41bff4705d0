"""What a BiGRU says; apart from the model, so that no module of ours waits for another while transformers loads them."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput


@dataclass
class BiGRUOutput(BaseModelOutput):
    """`last_hidden_state` (B, N, 2D) and, for every layer, the sentence state (B, L, 2D)."""

    sentence_states: Tensor | None = None


@dataclass
class BiGRUClassifierOutput(SequenceClassifierOutput):
    """Class logits (B, C) and the sentence states (B, L, 2D) of all layers."""

    sentence_states: Tensor | None = None
