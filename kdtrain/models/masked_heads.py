"""A masked language model as body, transform and decoder, so that its logits exist for some rows at a time only.

hidden = states_at_masked(model, input_ids, attention_mask, predicted)    # (masked tokens, D), what enters the encoder's head
logits = head.decoder(head.transform(hidden))                          # equal to model(...).logits[predicted]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdtrain.errors import KdtrainError


@dataclass(frozen=True)
class MaskedHead:
    """What stands between an encoder and its logits. The modules are the model's own, so tied weights stay tied."""

    transform: Callable[[Tensor], Tensor]
    """(..., D) to (..., D), before the decoder"""
    decoder: nn.Linear
    """(V, D) with its bias"""


def masked_head(model: PreTrainedModel) -> MaskedHead | None:
    """The head of a family that is known: RoBERTa's, BERT's, ModernBERT's, or a decoder alone; None for any other."""
    known: Any = model
    decoder, lm_head = model.get_output_embeddings(), getattr(model, "lm_head", None)
    if not isinstance(decoder, nn.Linear):
        return None
    if lm_head is decoder:
        return MaskedHead(nn.Identity(), decoder)
    if getattr(lm_head, "decoder", None) is decoder and hasattr(lm_head, "dense"):
        layers: Any = lm_head
        return MaskedHead(lambda hidden: layers.layer_norm(F.gelu(layers.dense(hidden))), decoder)
    if getattr(model, "decoder", None) is decoder and hasattr(model, "head"):
        return MaskedHead(known.head, decoder)
    predictions: Any = getattr(getattr(model, "cls", None), "predictions", None)
    if getattr(predictions, "decoder", None) is decoder and hasattr(predictions, "transform"):
        return MaskedHead(predictions.transform, decoder)
    return None


def states_at_masked(model: PreTrainedModel, ids: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
    """(masked tokens, D): the encoder's output at the tokens to be predicted, before the head."""
    encoder: Any = model.base_model
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state[predicted]


@torch.no_grad()
def check_masked_head(model: PreTrainedModel) -> None:
    """Compare a head that looks known with the model's own logits on a few tokens.

    Raises:
        KdtrainError: they differ, as where a family does something else around its head.
    """
    head = masked_head(model)
    if head is None:
        return
    training = model.training
    model.eval()
    decoder = head.decoder
    ids = (torch.arange(8, device=decoder.weight.device) * 7 + 3).remainder(decoder.out_features)[None]
    mask = torch.ones_like(ids)
    logits = decoder(head.transform(states_at_masked(model, ids, mask, mask.bool())))
    own = model(input_ids=ids, attention_mask=mask).logits[0]
    model.train(training)
    worst = float((logits - own).abs().max())
    if not worst <= 1e-3 * max(float(own.abs().max()), 1e-3):
        raise KdtrainError(
            f"the head of {type(model).__name__} does not give the model's own logits, they differ by {worst:.3g}; this "
            "family does something around its head that task masked_lm does not know"
        )
