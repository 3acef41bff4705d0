"""The teacher of a language model: frozen, in eval mode, never part of the student, its checkpoints or its optimizer."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kdkernels import TeacherHead
from kdtrain.engine.zero import is_zero3
from kdtrain.models.heads import Head, check_model, decoder_layers, head_of, hidden_states
from kdtrain.models.loading import load_model, load_tokenizer, parameter_count, weights_hash

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LanguageTeacher:
    """A frozen causal language model with its own tokenizer."""

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runs_here: ClassVar[bool] = True
    """whether its body is on this machine"""

    @property
    def head(self) -> Head:
        """Its output projection."""
        return head_of(self.model)

    @cached_property
    def weights_hash(self) -> str:
        """Of its model, see `kdtrain.models.loading.weights_hash`."""
        return weights_hash(self.model)

    @cached_property
    def parameters(self) -> int:
        """All weights, embeddings included."""
        return parameter_count(self.model)

    @torch.no_grad()
    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The input of the head, (B, N, D_t), and the outputs of the given layers, in the precision of the weights."""
        with torch.autocast(input_ids.device.type, enabled=False):
            return hidden_states(self.model, input_ids, position_ids, layers)

    def with_hidden(self, hidden: Tensor) -> TeacherHead:
        """Its distribution for these hidden states, in the form that the losses take."""
        head = self.head
        return TeacherHead(
            hidden.to(head.weight.dtype), head.weight, head.bias, softcap=head.softcap, scale=head.scale
        )

    def release(self) -> None:
        """Give up its layers once all that is needed of them is stored; its head stays."""
        _ = self.weights_hash, self.parameters
        layers = decoder_layers(self.model)
        for module in self.model.base_model.modules():
            for name, child in module.named_children():
                if child is layers:
                    setattr(module, name, nn.ModuleList())

    def place(self, accelerator: Accelerator) -> None:
        """Move it to this process's device; under FSDP2 and ZeRO 3 its layers are sharded over the processes.

        PyTorch shards them in both: DeepSpeed has but one engine for a model and its optimizer. Embeddings and head stay whole on every process: the loss reads all of the head in every step.
        """
        self.model.to(accelerator.device)
        spread = accelerator.is_fsdp2 or is_zero3(accelerator)
        if not spread or not any(
            isinstance(module, nn.ModuleList) and len(module) for module in self.model.base_model.modules()
        ):
            return
        from torch.distributed.fsdp import fully_shard

        whole = {self.head.weight, *self.model.get_input_embeddings().parameters()}
        for layer in decoder_layers(self.model):
            fully_shard(layer)
        fully_shard(self.model.base_model, ignored_params=whole)


def load_language_teacher(path: str, precision: str, *, packing: bool) -> LanguageTeacher:
    """Load a frozen causal language model and make sure that its head is understood.

    Raises:
        KdtrainError: it cannot be loaded, its head is not understood, or rows cannot be packed for it.
    """
    model = load_causal(path, "teacher.path", DTYPES[precision])
    model.eval().requires_grad_(False)
    check_model(model, "teacher", packing=packing)
    return LanguageTeacher(path, model, load_tokenizer(path, "teacher.path"))


def load_causal(path: str, field: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model by folder or hub id; `field` is the recipe key that is blamed."""
    return load_model(AutoModelForCausalLM, path, field, dtype=dtype)
