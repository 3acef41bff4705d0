"""A bidirectional GRU encoder that loads like any transformers model once `kdtrain` is imported."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from kdtrain.models.bigru_config import BiGRUConfig
from kdtrain.models.bigru_outputs import BiGRUClassifierOutput, BiGRUOutput
from kdtrain.models.bigru_steps import PackedSteps, bigru_layer


class BiGRUPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading."""

    config_class = BiGRUConfig
    base_model_prefix = "bigru"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                # Loaded ones carry this mark, their chunks below do not; transformers 5.0 to 5.12 call this after loading.
                if getattr(parameter, "_is_hf_initialized", False):
                    continue
                if name.startswith("weight_hh"):
                    for gate in parameter.chunk(3):
                        nn.init.orthogonal_(gate)
                elif name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
        else:
            super()._init_weights(module)


class BiGRUModel(BiGRUPreTrainedModel):
    """Embeddings (token + position, layer norm, dropout) and one bidirectional GRU per layer over the real tokens."""

    def __init__(self, config: BiGRUConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.token_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            nn.GRU(width if i == 0 else 2 * width, width, batch_first=True, bidirectional=True)
            for i in range(config.num_hidden_layers)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.token_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> BiGRUOutput:
        """Encode (B, N) token ids; padding may stand on either side and is never read.

        `output_hidden_states` also gives what every layer says of every token, (B, N, 2D) from layer 1 on, with zeros
        at padding; element 0 holds the embeddings, (B, N, D). The sentence state of a layer joins the forward half after the last token with the backward half after the first.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # Real tokens first, in order: the packed form wants them there. Right-padded rows stay as they are.
        order = mask.argsort(dim=1, descending=True, stable=True)
        tokens = input_ids.gather(1, order).masked_fill(mask.gather(1, order) == 0, self.config.pad_token_id)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.dropout(
            self.norm(self.token_embeddings(tokens) + self.position_embeddings(positions))
        )
        lengths = mask.sum(dim=1).cpu()  # the packed form needs them on the host
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        # On a CPU the steps of kdtrain.models.bigru_steps have much the faster backward; nn.GRU's forward alone is the faster one.
        steps = PackedSteps.of(packed) if embedded.device.type == "cpu" and self.training else None
        states, outputs = [], [packed]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.GRU)
            if i > 0:
                packed = packed._replace(data=self.dropout(packed.data))
            if steps is None:
                packed, last = layer(packed)
                states.append(torch.cat([last[0], last[1]], dim=-1))
            else:
                packed = packed._replace(data=bigru_layer(layer, packed.data, steps))
                states.append(steps.ends(packed.data))
            outputs.append(packed)
        back, length = order.argsort(dim=1)[..., None], input_ids.shape[1]
        hidden = []
        for one in outputs if output_hidden_states else outputs[-1:]:
            padded, _lengths = pad_packed_sequence(one, batch_first=True, total_length=length)
            hidden.append(padded.gather(1, back.expand_as(padded)))
        return BiGRUOutput(
            last_hidden_state=hidden[-1],
            hidden_states=tuple(hidden) if output_hidden_states else None,
            sentence_states=torch.stack(states, dim=1),
        )


class BiGRUForSequenceClassification(BiGRUPreTrainedModel):
    """The encoder under RoBERTa's classification head: dropout, dense, tanh, dropout, projection onto the classes."""

    def __init__(self, config: BiGRUConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        width = 2 * config.hidden_size
        dropout = (
            config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        )
        self.bigru = BiGRUModel(config)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(width, self.num_labels),
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> BiGRUClassifierOutput:
        """Class logits of (B, N) token ids; with `labels` (B,) also the mean cross-entropy."""
        encoded = self.bigru(input_ids, attention_mask, output_hidden_states)
        logits = self.classifier(encoded.sentence_states[:, -1])
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return BiGRUClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            sentence_states=encoded.sentence_states,
        )


AutoModel.register(BiGRUConfig, BiGRUModel, exist_ok=True)
AutoModelForSequenceClassification.register(BiGRUConfig, BiGRUForSequenceClassification, exist_ok=True)
