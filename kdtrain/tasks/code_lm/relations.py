"""Relations of tokens to tokens inside attention: what MiniLM compares, for decoders, packed rows and any head counts.

with attention_inputs(model, (6,)) as found:      # found[6].query, .key, .value as they enter the attention
    hidden, _ = hidden_states(model, input_ids, position_ids)
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdkernels import relation_kl
from kdtrain.errors import KdtrainError
from kdtrain.models.heads import decoder_layers, hidden_states
from kdtrain.tasks.code_lm.packing import IGNORED

Relation = Literal["attention", "queries", "keys", "values"]


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention is given: after rotations and norms, before keys are repeated for grouped queries."""

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
    """Keep what enters the attention of the given layers (1 is the first) while the model runs.

    The model's own attention function is called as always; only references are kept. A model that does not go through
    transformers' attention interface leaves the dictionary empty.
    """
    found: dict[int, AttentionInputs] = {}
    if model is None or not layers:
        yield found
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
            found[wanted[id(module)]] = AttentionInputs(query, key, value, scaling)
        # Every family has an eager attention of its own, which the interface does not list.
        function = plain or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, *others, **options)

    # Layers that are recomputed in backward meet the plain function again.
    ALL_ATTENTION_FUNCTIONS[name] = keep
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@dataclass(frozen=True)
class RelationLoss:
    """KL of the teacher's relations to the student's on mapped layers."""

    kinds: tuple[Relation, ...]
    pairs: tuple[tuple[int, int], ...]
    """student layer, teacher layer"""
    heads: int | None = None
    """relation heads; None takes the models' own"""

    def __call__(
        self,
        student: dict[int, AttentionInputs],
        teacher: dict[int, AttentionInputs],
        position_ids: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """0-D: the sum over tokens whose label counts, summed over the kinds, averaged over the pairs of layers.

        Args:
            position_ids, labels: (B, N). A token is compared with itself and what stands before it in its document,
                whether the labels there count or not.
        """
        documents = split_documents(position_ids, labels)
        first = student[self.pairs[0][0]].query
        total = first.new_zeros((), dtype=torch.float32)
        for ours, theirs in self.pairs:
            for kind in self.kinds:
                sides = (*student[ours].of(kind), *teacher[theirs].of(kind))
                heads = self.heads_of(kind, sides[0], sides[2])
                student_q, student_k, teacher_q, teacher_k = (
                    None if side is None else side.transpose(1, 2).flatten(2).flatten(0, 1) for side in sides
                )
                assert student_q is not None and teacher_q is not None
                for part in documents:
                    values = relation_kl(
                        student_q[part.tokens],
                        teacher_q[part.tokens],
                        None if student_k is None else student_k[part.tokens],
                        None if teacher_k is None else teacher_k[part.tokens],
                        heads=heads,
                        mask=part.inside,
                        causal=True,
                        reduction="none",
                    )
                    total = total + (values * part.counted).sum() / max(heads)
        return total / len(self.pairs)

    def heads_of(self, kind: Relation, student: Tensor, teacher: Tensor) -> tuple[int, int]:
        """Relation heads of both sides, whose queries, keys or values (B, H, N, d) these are.

        Raises:
            KdtrainError: they do not divide the widths, or the models' own counts do not go together.
        """
        heads = self.heads
        if heads is None:
            counts = (student.shape[1], teacher.shape[1])
            if max(counts) % min(counts):
                raise KdtrainError(
                    f"the student has {counts[0]} heads of {kind}, the teacher {counts[1]}, and neither is a multiple of the "
                    "other; set method.relation_heads to a number that divides both widths"
                )
            return counts
        for side, features in (("student", student), ("teacher", teacher)):
            width = features.shape[1] * features.shape[3]
            if width % heads:
                raise KdtrainError(
                    f"method.relation_heads is {heads}, which does not divide the width {width} of the {side}'s {kind}"
                )
        return heads, heads

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Run both models on two tokens and see whether their relations can be compared.

        Raises:
            KdtrainError: as `heads_of`; a model whose attention cannot be looked into.
        """
        sides = []
        for side, model, layers in (
            ("student", student, tuple(pair[0] for pair in self.pairs)),
            ("teacher", teacher, tuple(pair[1] for pair in self.pairs)),
        ):
            ids = torch.arange(2, device=next(model.parameters()).device)[None]
            with torch.no_grad(), attention_inputs(model, layers) as found:
                hidden_states(model, ids, ids)
            if set(found) != set(layers):
                raise KdtrainError(
                    f"the {side} ({type(model).__name__}) does not show what enters its attention; set method.features: [hidden]"
                )
            sides.append([found[layer] for layer in layers])
        for ours, theirs in zip(*sides, strict=True):
            for kind in self.kinds:
                self.heads_of(kind, ours.of(kind)[0], theirs.of(kind)[0])


@dataclass(frozen=True)
class DocumentGroup:
    """Documents of similar length, each a row of its own."""

    tokens: Tensor
    """(documents, longest) int64, where each token stands among the B * N; padding repeats the first"""
    inside: Tensor
    """(documents, longest) bool"""
    counted: Tensor
    """(documents, longest) bool: whether the token's label counts"""


def split_documents(position_ids: Tensor, labels: Tensor) -> list[DocumentGroup]:
    """The documents of packed rows (B, N) that have a label that counts, in groups whose lengths differ by less than 2.

    So padding at most doubles the tokens, and a long document beside short ones does not make rows of all of them.
    """
    device = labels.device
    opens = (position_ids == 0).clone()
    opens[:, 0] = True
    starts = opens.flatten().nonzero().squeeze(1).cpu()
    ends = torch.cat([starts[1:], torch.tensor([labels.numel()])])
    counts = (labels != IGNORED).flatten()
    sums = nn.functional.pad(counts.cumsum(0).cpu(), (1, 0))
    kept = sums[ends] > sums[starts]
    starts, lengths = starts[kept], (ends - starts)[kept]
    groups = []
    sizes = lengths.float().log2().floor()
    for size in sizes.unique().tolist():
        chosen = sizes == size
        first, length = starts[chosen, None], lengths[chosen, None]
        columns = torch.arange(int(length.max()))
        inside = columns < length
        tokens = torch.where(inside, first + columns, first).to(device)
        inside = inside.to(device)
        groups.append(DocumentGroup(tokens, inside, inside & counts[tokens]))
    return groups
