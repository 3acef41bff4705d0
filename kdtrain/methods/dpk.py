"""DPK (Qiu et al., ICLR 2023, arXiv 2206.06067): a part of the teacher's states is given, the other has to be reconstructed."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Needs, Step
from kdtrain.methods.kd import Weight
from kdtrain.methods.sampling import uniform
from kdtrain.methods.token_states import TokenStates, TokenStatesOptions
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import Number


class DynamicPrior(TokenStates):
    """The terms of kd, and `feature_weight * MSE(F_t, Dec(F_mix))` over the tokens, a mean over widths and layer pairs.

    F are the states of a layer, normalised over their width. Both sides are mapped onto the student's width and pass an
    encoder of one Transformer layer each. At every position F_mix is that of the teacher where m > tau, else that of the
    student, with m uniform in [0, 1). The decoder is one Transformer layer and a map onto the teacher's width.

    tau is a running mean, `decay * tau + (1 - decay) * CKA(F_s, F_t)`, from 0.5: the more alike both sides are, the less is
    given. The linear CKA is that of the tokens of the whole batch, out of sums of products that micro-batches and processes
    add up, so tau does not depend on how a batch is split. m is a function of seed, step and row.

    The equations of the paper were not at hand: this is the form of a public implementation, without its auxiliary
    classifier. Texts are compared by position, up to the end of the shorter. Encoders and decoder are not saved with the
    student.
    """

    class Options(TokenStatesOptions):
        """Reconstruct the teacher's states with a part of them given."""

        name: Literal["dpk"] = "dpk"
        feature_weight: Weight = Field(default=1.0, description="weight of the reconstruction")
        decay: Annotated[Number, Field(ge=0, lt=1)] = Field(
            default=0.9, description="decay of the running mean of the similarity"
        )

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        if not student.embeddings:
            raise KdtrainError(
                "method dpk reads the student token by token and needs a Transformer student; set student.architecture: "
                "roberta"
            )
        widths = (student.width, teacher.width)
        self.stages = nn.ModuleList(Stage(*widths) for _ in self.pairs)
        self.register_buffer("prior", torch.full((len(self.pairs),), 0.5))
        """tau of every pair"""
        self._similarity: Tensor | None = None

    def needs(self) -> Needs:
        """States of every token, and statistics of the whole batch."""
        return Needs(tokens=self.pairs, whole_batch=True)

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and feature."""
        return {**super().weights(step), "feature": self.options.feature_weight}

    def sides(self, student: Outputs, teacher: TeacherOutputs, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised states of both sides (S, N, D) of one pair, and the mask (S, N) of the tokens that both have."""
        assert student.token_mask is not None and teacher.token_mask is not None
        length = min(student.token_mask.shape[1], teacher.token_mask.shape[1])
        mask = student.token_mask[:, :length] & teacher.token_mask[:, :length]
        layers = self.pairs[number]
        ours, theirs = (
            layer_norm(side.tokens[layer][:, :length].float(), side.tokens[layer].shape[2:])
            for side, layer in zip((student, teacher), layers, strict=True)
        )
        return ours, theirs, mask

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """By pair, (1, K): sums of products over the tokens of a micro-batch."""
        (teacher,) = teachers.values()
        found = {}
        for number in range(len(self.pairs)):
            ours, theirs, mask = self.sides(student, teacher, number)
            both = torch.cat([ours[mask], theirs[mask]], dim=1).double()
            both = torch.cat([both, torch.ones_like(both[:, :1])], dim=1)
            found[f"products {number}"] = (both.T @ both).flatten()[None]
        return found

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and feature."""
        (teacher,) = teachers.values()
        prior = self.get_buffer("prior")
        losses, similar = [], []
        for number, stage in enumerate(self.stages):
            ours, theirs, mask = self.sides(student, teacher, number)
            draws = [
                uniform(mask.shape[1], step.seed, step.number, number, text, row)
                for row in batch.rows.tolist()
                for text in range(student.texts)
            ]
            given = torch.stack(draws).to(ours) > prior[number]
            errors = (stage(ours, theirs, given, mask) - theirs).square().mean(2)
            losses.append((errors * mask).sum(1).div(mask.sum(1).clamp_min(1)).sum())
            products = batch.whole[f"products {number}"].values.sum(0)
            similar.append(similarity(products, ours.shape[2]))
        self._similarity = torch.stack(similar)
        total = torch.stack(losses).sum() / (len(losses) * student.texts)
        return {**super().terms(step, batch, student, teachers), "feature": total}

    @torch.no_grad()
    def after_step(self, step: Step, values: Mapping[str, Tensor]) -> None:
        """Move tau towards the similarity of this batch."""
        assert self._similarity is not None
        prior, decay = self.get_buffer("prior"), self.options.decay
        prior.copy_(decay * prior + (1 - decay) * self._similarity)

    def logged(self) -> dict[str, Tensor]:
        """tau, a mean over the pairs."""
        return {"prior": self.get_buffer("prior").mean()}


class Stage(nn.Module):
    """Encoders of both sides and the decoder, for one pair of layers."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(student, student), nn.Linear(teacher, student)])
        self.encoders = nn.ModuleList([block(student), block(student)])
        self.decoder, self.out = block(student), nn.Linear(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, given: Tensor, mask: Tensor) -> Tensor:
        """(S, N, D_t): the teacher's states out of a mixture.

        Args:
            student, teacher: (S, N, D).
            given: (S, N) bool, positions at which the teacher's are given.
            mask: (S, N) bool, tokens that are no padding.
        """
        ours, theirs = (
            encoder(linear(side), src_key_padding_mask=~mask)
            for side, linear, encoder in zip((student, teacher), self.maps, self.encoders, strict=True)
        )
        mixed = torch.where(given.unsqueeze(2), theirs, ours)
        return self.out(self.decoder(mixed, src_key_padding_mask=~mask))


def block(width: int) -> nn.TransformerEncoderLayer:
    """One Transformer layer without dropout."""
    heads = next(heads for heads in (4, 2, 1) if width % heads == 0)
    return nn.TransformerEncoderLayer(
        width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def similarity(products: Tensor, width: int) -> Tensor:
    """Linear CKA of both sides, 0-D in [0, 1].

    Args:
        products: (K,) float64, `z^T z` of the rows `z = (student, teacher, 1)`, flat.
        width: of the student.
    """
    size = math.isqrt(len(products))
    whole = products.view(size, size)
    sums, count = whole[-1, :-1], whole[-1, -1].clamp_min(1)
    centred = whole[:-1, :-1] - torch.outer(sums, sums) / count
    ours, theirs = centred[:width, :width], centred[width:, width:]
    lengths = torch.linalg.norm(ours) * torch.linalg.norm(theirs)
    return centred[:width, width:].square().sum() / lengths.clamp_min(1e-12)
