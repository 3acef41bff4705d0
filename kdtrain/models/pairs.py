"""A classifier of pairs of texts, in the manner of CodeXGLUE's clone detection: two first tokens under one head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from kdtrain.models.bigru_config import BiGRUConfig
from kdtrain.models.bigru_outputs import BiGRUClassifierOutput
from kdtrain.models.pair_config import PairConfig

WITH_POOLER = ("roberta", "bert", "camembert", "xlm-roberta", "electra")
"""Encoders that would bring a pooler along that nothing here reads."""


class PairHead(nn.Module):
    """(B, 2W) sentence vectors of both texts: dropout, dense onto W, tanh, dropout, projection onto the classes."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(width, classes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Class logits (B, C)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(vectors)))))


class PairForSequenceClassification(PreTrainedModel):
    """One encoder for both texts of a row, and a head over both sentence vectors.

    The sentence vector is the first token's, or a BiGRU's joined ends. Hidden states come out as (2B, ...): the two
    texts of a row follow each other.
    """

    config_class = PairConfig
    base_model_prefix = "encoder"

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        inner = config.encoder_config
        options = {"add_pooling_layer": False} if inner.model_type in WITH_POOLER else {}
        self.encoder = AutoModel.from_config(inner, trust_remote_code=False, **options)
        width = int(inner.hidden_size) * (2 if isinstance(inner, BiGRUConfig) else 1)
        self.num_labels = int(config.num_labels or 2)
        self.classifier = PairHead(width, self.num_labels, config.classifier_dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embedding."""
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> BiGRUClassifierOutput:
        """Class logits of (B, 2, N) token ids; with `labels` (B,) also the mean cross-entropy."""
        encoded = self.encoder(
            input_ids=input_ids.flatten(0, 1),
            attention_mask=None if attention_mask is None else attention_mask.flatten(0, 1),
            output_hidden_states=output_hidden_states,
        )
        states = getattr(encoded, "sentence_states", None)
        vectors = encoded.last_hidden_state[:, 0] if states is None else states[:, -1]
        logits = self.classifier(vectors.reshape(len(input_ids), -1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return BiGRUClassifierOutput(
            loss=loss,
            logits=logits,
            sentence_states=states,
            hidden_states=getattr(encoded, "hidden_states", None),
        )


AutoModelForSequenceClassification.register(PairConfig, PairForSequenceClassification, exist_ok=True)
