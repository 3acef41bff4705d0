"""A causal language model as body and head, so that its logits never have to exist.

hidden = body(input_ids, position_ids)              # (B, N, D), what enters the head
logits = cap(scale * (hidden @ weight.T + bias))    # equal to model(...).logits, and never computed
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdtrain.errors import KdtrainError

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""what configurations call the cap of the logits: Gemma, RecurrentGemma, xLSTM"""


@dataclass(frozen=True)
class Head:
    """The output projection of a language model. Scale comes before the cap, the bias before both."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,)"""
    softcap: float | None = None
    """logits become softcap * tanh(logits / softcap)"""
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden (..., D), for small tests of the head; training never calls this."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model; its tensors are the model's own, so tied heads stay tied.

    Raises:
        KdtrainError: the model has no linear head.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise KdtrainError(
            f"{type(model).__name__} has no linear output layer, so there is no head to take (found {type(layer).__name__})"
        )
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    return Head(layer.weight, layer.bias, next((cap for cap in caps if cap is not None), None), scale)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layers: tuple[int, ...] = ()
) -> tuple[Tensor, list[Tensor]]:
    """What enters the head, (B, N, D), and the outputs of the given layers (1 is the first), each (B, N, D).

    Position ids that start again open a new document, which does not see what stands before it.
    """
    places = {"position_ids": position_ids} if reads_positions(model) else {}
    found: dict[int, Tensor] = {}

    def keeper(number: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found[number] = output if isinstance(output, Tensor) else output[0]

        return keep

    blocks = list(decoder_layers(model)) if layers else []
    hooks = [blocks[number - 1].register_forward_hook(keeper(number)) for number in set(layers)]
    try:
        output = body_of(model)(input_ids=input_ids, use_cache=False, **places)
    finally:
        for hook in hooks:
            hook.remove()
    return output.last_hidden_state, [found[number] for number in layers]


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head, also of a model that peft wrapped."""
    unwrapped = getattr(model, "get_base_model", lambda: model)()
    body = unwrapped.base_model
    if body is unwrapped:  # Llama4's text model names as its base what it does not have
        return getattr(unwrapped, "model", body)
    return body


def reads_positions(model: PreTrainedModel) -> bool:
    """Whether the body takes position ids, without which several documents cannot share a row."""
    return "position_ids" in inspect.signature(body_of(model).forward).parameters


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of layers of the body."""
    count = model.config.get_text_config().num_hidden_layers
    for module in body_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise KdtrainError(f"{type(model).__name__} keeps its {count} layers in no list that could be found")


@torch.no_grad()
def check_model(model: PreTrainedModel, side: str, *, packing: bool) -> None:
    """Compare (hidden, head) with the model's own logits on a few tokens, and look whether documents see each other.

    A family that does something else between body and logits would otherwise be distilled wrongly in silence.

    Raises:
        KdtrainError: the logits differ, or a packed document changes with its neighbour.
    """
    training = model.training
    model.eval()
    ids, places = check_tokens(model)
    hidden, _ = hidden_states(model, ids, places)
    known = {"position_ids": places} if reads_positions(model) else {}
    logits, own = (
        head_of(model).logits(hidden).float(),
        model(input_ids=ids, use_cache=False, **known).logits.float(),
    )
    worst, size = float((logits - own).abs().max()), float(own.abs().max())
    if not worst <= 1e-2 * max(size, 1e-3):
        raise KdtrainError(
            f"the head of the {side} ({type(model).__name__}) does not give its own logits: they differ by {worst:.3g} of "
            f"{size:.3g}; this family does something between body and logits that kdtrain does not know"
        )
    model.train(training)
    if packing and mixes_documents(model):
        raise KdtrainError(
            f"the {side} ({type(model).__name__}) lets documents that share a row see each other; set data.packing: false"
        )


@torch.no_grad()
def mixes_documents(model: PreTrainedModel) -> bool:
    """Whether a document changes with what stands before it in its row, another document or padding."""
    training = model.training
    model.eval()
    ids, places = check_tokens(model)
    hidden, _ = hidden_states(model, ids, places)
    other = ids.clone()
    other[0, :5] = (other[0, :5] + 11).remainder(int(model.config.get_text_config().vocab_size))
    changed = float((hidden_states(model, other, places)[0][0, 5:] - hidden[0, 5:]).abs().max())
    alone = hidden_states(model, ids[:, 5:], places[:, 5:])[0][0]
    differs = float((alone - hidden[0, 5:]).abs().max())
    model.train(training)
    size = max(float(hidden.abs().max()), 1e-3)
    # What is masked has no part at all; a row of another length is rounded otherwise.
    return changed > 1e-4 * size or differs > 1e-2 * size


def check_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Ids and positions (1, 12) of a row of two documents, of 5 and 7 tokens."""
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = (torch.arange(12, device=device) * 7 + 3).remainder(vocabulary)[None]
    return ids, torch.cat([torch.arange(5), torch.arange(7)]).to(device)[None]
