"""Relations of tokens to tokens inside attention (MiniLM, Wang et al. 2020 and 2021), for packed rows and any head counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from kdkernels import relation_kl
from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Method, Needs, Pairs, Step
from kdtrain.methods.kd import Weight
from kdtrain.methods.layers import check_layer_map
from kdtrain.models.attention import Relation
from kdtrain.models.loading import Shape
from kdtrain.outputs import IGNORED, Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import POSITIVE, MethodOptions, Whole


def _different(kinds: tuple[Relation, ...]) -> tuple[Relation, ...]:
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"method.relations must name one or more of attention, queries, keys, values, each once, got {list(kinds)}"
        )
    return kinds


class RelationDistillation(Method):
    """`relation_weight * KL` of the relations of the teacher from those of the student, on mapped layers.

    A token is compared with itself and the tokens before it in its document. Every counted token has the mean over the
    heads, summed over the kinds of relations, averaged over the pairs of layers.
    """

    # The relations are causal.
    tasks = frozenset({"code_lm"})

    class Options(MethodOptions):
        """Relations of tokens to tokens inside attention."""

        name: Literal["relations"] = "relations"
        relations: Annotated[tuple[Relation, ...], AfterValidator(_different)] = Field(
            default=("queries", "keys", "values"),
            description="attention (KL of the attention maps), queries, keys, values (KL of the relations of each with "
            "itself, token to token)",
        )
        relation_weight: Weight = Field(default=1.0, description="weight of the sum of the KLs")
        relation_heads: Annotated[Whole, POSITIVE] | None = Field(
            default=None,
            description="heads that queries, keys and values are split into for their relations; by default the heads of "
            "the models",
        )
        layer_map: Pairs = Field(
            default=(), description="pairs [student layer, teacher layer]; by default the last of both"
        )

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        self.pairs = options.layer_map or ((student.layers, teacher.layers),)
        check_layer_map(self.pairs, student.layers, teacher.layers)

    def needs(self) -> Needs:
        """The inputs of attention, which are not stored."""
        return Needs(attention=self.pairs, live=True)

    def weights(self, step: Step) -> dict[str, float]:
        """relation."""
        return {"relation": self.options.relation_weight}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """relation."""
        (teacher,) = teachers.values()
        for side, outputs, layers in (
            ("student", student, {pair[0] for pair in self.pairs}),
            ("teacher", teacher, {pair[1] for pair in self.pairs}),
        ):
            if not layers <= set(outputs.attention):
                raise KdtrainError(
                    f"the {side} does not show the inputs of its attention (transformers' attention interface is not used "
                    "by its family); leave method relations out"
                )
        documents = split_documents(batch.positions, batch.labels)
        first = student.attention[self.pairs[0][0]].query
        total = first.new_zeros((), dtype=torch.float32)
        for ours, theirs in self.pairs:
            for kind in self.options.relations:
                sides = (*student.attention[ours].of(kind), *teacher.attention[theirs].of(kind))
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
        return {"relation": total / len(self.pairs)}

    def heads_of(self, kind: Relation, student: Tensor, teacher: Tensor) -> tuple[int, int]:
        """Relation heads of both sides, whose queries, keys or values (B, H, N, d) these are.

        Raises:
            KdtrainError: they do not divide the widths, or the head counts of the models do not fit each other.
        """
        heads = self.options.relation_heads
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
    """The documents of packed rows (B, N) that have a counted label, in groups whose lengths differ by less than 2.

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
