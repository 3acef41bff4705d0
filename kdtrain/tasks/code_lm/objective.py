"""What a language model minimises: cross entropy and divergence in one fused call, and mapped layers of both sides.

Every term is a sum over the labels that count, divided once by their number in the whole batch. That number is known
before any piece runs, so pieces, processes, padding and packing change neither loss nor gradient.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkernels import (
    JSD,
    TVD,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    Teacher,
    TeacherCrossTerm,
    TeacherHead,
    TeacherTopK,
    linear_kd_loss,
    projection_mse,
)
from kdtrain.errors import KdtrainError
from kdtrain.methods.layers import check_layer_map
from kdtrain.models.heads import head_of, hidden_states
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.tasks.base import Objective
from kdtrain.tasks.code_lm.metrics import silent_teacher, token_sums
from kdtrain.tasks.code_lm.packing import IGNORED, LanguageBatch
from kdtrain.tasks.code_lm.recipe import LanguageMethodRecipe, LanguageTeacherRecipe
from kdtrain.tasks.code_lm.relations import Relation, RelationLoss, attention_inputs


@dataclass
class Weights:
    """The numbers that may change with the step."""

    temperature: float
    kd: float
    ce: float

    @classmethod
    def at(cls, recipe: LanguageMethodRecipe, share: float) -> "Weights":
        """Between the first step (share 0) and the last (share 1), on a straight line where the recipe names an end."""

        def between(first: float, last: float | None) -> float:
            return first if last is None else first + share * (last - first)

        return cls(
            between(recipe.temperature, recipe.last_temperature),
            between(recipe.kd_weight, recipe.last_kd_weight) if recipe.name != "ft" else 0.0,
            between(recipe.ce_weight, recipe.last_ce_weight) if recipe.name != "ft" else 1.0,
        )


def divergence_of(recipe: LanguageMethodRecipe) -> Divergence:
    """The recipe's divergence with its parameter.

    Raises:
        KdtrainError: there is none of this name, or its parameter is out of range.
    """
    known: dict[str, Callable[[], Divergence]] = {
        "forward_kl": ForwardKL,
        "reverse_kl": ReverseKL,
        "jsd": partial(JSD, recipe.beta),
        "skew_kl": partial(SkewKL, recipe.alpha),
        "skew_reverse_kl": partial(SkewReverseKL, recipe.alpha),
        "tvd": TVD,
    }
    if recipe.divergence not in known:
        raise KdtrainError(f"method.divergence is {recipe.divergence!r}; it is one of {', '.join(known)}")
    try:
        return known[recipe.divergence]()
    except ValueError as error:
        raise KdtrainError(f"method.divergence {recipe.divergence}: {error}") from None


class LanguageObjective(Objective):
    """A student language model, and the projections of a hidden-state loss, as one module.

    The teacher is held beside it and is no part of it: not in its state, its optimizer or its wrappers.
    A sampling method is a subclass with `make_batch`; a weighing one with `token_statistic` and `weigh`.

    Args:
        teacher: loaded, or None for labels alone and for kept tokens that were made elsewhere.
        vocab_map: how the heads line up, see `VocabularyMatch.vocab_map`.
        stored: the teacher section of the recipe where batches carry what was stored of the teacher.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        recipe: LanguageMethodRecipe,
        teacher: LanguageTeacher | None,
        *,
        vocab_map: str | Tensor | None = None,
        stored: LanguageTeacherRecipe | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.divergence = divergence_of(recipe)
        self.weights = Weights.at(recipe, 0.0)
        self.tail: Literal["renormalize", "bucket"] = "bucket" if stored is None else stored.tail
        self.vocab_map = vocab_map
        # A list hides it from nn.Module.
        self.held: list[LanguageTeacher] = [] if teacher is None else [teacher]
        if recipe.name == "ft":
            self.names = ("ce",)
        else:  # from kept tokens and cross-terms the two come in one number
            whole = stored is None or stored.signal in ("online", "hidden")
            self.names = ("kd", "ce") if whole else ("kd_and_ce",)
        self.pairs: tuple[tuple[int, int], ...] = ()
        self.projections, self.relations = nn.ModuleList(), None
        self._no_split_modules = getattr(student, "_no_split_modules", None)  # what FSDP2 shards
        if recipe.name == "kd_features":
            assert teacher is not None
            shapes = [model.config.get_text_config() for model in (student, teacher.model)]
            layers = [int(shape.num_hidden_layers) for shape in shapes]
            self.pairs = recipe.layer_map or ((layers[0], layers[1]),)
            check_layer_map(self.pairs, layers[0], layers[1])
            if "hidden" in recipe.features:
                self.names = (*self.names, "feature")
                self.projections = nn.ModuleList(
                    nn.Linear(int(shapes[0].hidden_size), int(shapes[1].hidden_size)) for _ in self.pairs
                )
            kinds: tuple[Relation, ...] = tuple(kind for kind in recipe.features if kind != "hidden")
            if kinds:
                self.names = (*self.names, "relation")
                self.relations = RelationLoss(kinds, self.pairs, recipe.relation_heads)
                self.relations.check(student, teacher.model)

    @property
    def teacher(self) -> LanguageTeacher | None:
        """The teacher, where there is one."""
        return self.held[0] if self.held else None

    @property
    def shared(self) -> int:
        """Ids 0 to shared - 1 mean the same token to student and teacher."""
        if isinstance(self.vocab_map, Tensor):
            return int((self.vocab_map >= 0).sum())
        heads = [head_of(self.student)] + ([] if self.teacher is None else [self.teacher.head])
        return min(head.weight.shape[0] for head in heads)

    def start_step(self, step: int, total_steps: int) -> None:
        """Weights and temperature of this step."""
        self.weights = Weights.at(self.recipe, step / max(1, total_steps - 1))

    # ---- hooks of methods that change the batch

    def make_batch(self, piece: LanguageBatch) -> LanguageBatch:
        """Make the rows anew, for example from samples of the student; the same by default."""
        return piece

    def token_statistic(self, piece: LanguageBatch) -> Tensor | None:
        """(B, N) float32, a number for every token by which the whole batch is weighed; none by default."""
        return None

    def weigh(self, statistics: list[Tensor], whole: Tensor) -> list[Tensor]:
        """(B, N) weights for each piece's (B, N) statistic; `whole` (counted,) holds those of all counted tokens."""
        raise NotImplementedError

    def look_ahead(
        self,
        pieces: Iterable[LanguageBatch],
        rows: Sequence[Tensor],
        whole: Tensor,
        divisor: int,
        accelerator: Accelerator,
    ) -> tuple[Iterable[LanguageBatch], int]:
        """Run the hooks that a method has; the divisor is counted anew when it made its own batch."""
        own = type(self)
        if own.make_batch is not LanguageObjective.make_batch:
            pieces = [self.make_batch(piece) for piece in pieces]
            counts = [
                int((piece.labels != IGNORED).sum()) if len(row) else 0
                for piece, row in zip(pieces, rows, strict=True)
            ]
            total = torch.tensor(float(sum(counts)), device=accelerator.device)
            divisor = int(accelerator.reduce(total, "sum"))  # type: ignore[arg-type]
            if divisor == 0:
                raise KdtrainError("a batch that the method made itself holds no label that counts")
        if own.token_statistic is not LanguageObjective.token_statistic:
            pieces = list(pieces)
            statistics = [self.token_statistic(piece) for piece in pieces]
            values = [
                statistic[piece.labels != IGNORED]
                for statistic, piece, row in zip(statistics, pieces, rows, strict=True)
                if statistic is not None and len(row)
            ]
            mine = torch.cat(values) if values else torch.zeros(0, device=accelerator.device)
            everything = gather_ragged(mine, accelerator)
            weights = self.weigh([part for part in statistics if part is not None], everything)
            pieces = [piece.with_weight(weight) for piece, weight in zip(pieces, weights, strict=True)]
        return pieces, divisor

    # ---- the loss

    def forward(self, batch: LanguageBatch, divisor: int, *, measure: bool = False) -> tuple[Tensor, Tensor]:
        """Loss (0-D) of this piece of a batch of `divisor` counted labels, and the detached sum of every term.

        With `measure` nothing is trained: the second part is what `token_sums` gives.
        """
        if measure:
            hidden, _ = hidden_states(self.student, batch.input_ids, batch.position_ids)
            return hidden.new_zeros(()), token_sums(self, hidden, self.teacher_head(batch)[0], batch.labels)
        ours, theirs = (tuple(pair[side] for pair in self.pairs) for side in (0, 1))
        states, related = bool(self.projections), self.relations is not None
        with attention_inputs(self.student, ours if related else ()) as student_attention:
            hidden, layers = hidden_states(
                self.student, batch.input_ids, batch.position_ids, ours if states else ()
            )
        known = None if self.teacher is None else self.teacher.model
        with attention_inputs(known, theirs if related else ()) as teacher_attention:
            teacher, teacher_layers = self.teacher_signal(batch, theirs if states else ())
        head, weights = head_of(self.student), self.weights
        values = partial(
            linear_kd_loss,
            hidden,
            head.weight,
            silent_teacher(hidden, head.weight.shape[0]) if teacher is None else teacher,
            batch.labels,
            student_bias=head.bias,
            divergence=self.divergence,
            temperature=weights.temperature,
            kd_weight=weights.kd,
            ce_weight=weights.ce,
            token_weight=batch.token_weight,
            num_items_in_batch=divisor,
            softcap=head.softcap,
            logit_scale=head.scale,
            # What is kept was kept of the shared tokens already.
            vocab_map=self.vocab_map if isinstance(teacher, TeacherHead) else None,
        )
        # Statistics cost passes over the logits: not where the loss is the one number that is reported.
        if self.recipe.name == "ft" or isinstance(teacher, TeacherTopK | TeacherCrossTerm):
            loss = values()
            return loss, loss.detach()[None] * divisor
        loss, stats = values(return_stats=True)
        token_weight = 1.0 if batch.token_weight is None else batch.token_weight
        terms = {
            "kd": weights.temperature**2 * (stats.kd * token_weight).sum(),
            "ce": (stats.ce * token_weight).sum(),
        }
        if self.projections:
            feature = self.feature_loss(layers, teacher_layers, batch)
            loss = loss + self.recipe.feature_weight * feature / divisor
            terms["feature"] = feature.detach()
        if self.relations is not None:
            relation = self.relations(student_attention, teacher_attention, batch.position_ids, batch.labels)
            loss = loss + self.recipe.relation_weight * relation / divisor
            terms["relation"] = relation.detach()
        return loss, torch.stack([terms[name] for name in self.names])

    def teacher_signal(
        self, batch: LanguageBatch, layers: tuple[int, ...] = ()
    ) -> tuple[Teacher | None, list[Tensor]]:
        """What the loss learns from: the teacher's distribution in the form it comes in, and the given layers."""
        if self.recipe.name == "ft":
            return None, []
        if batch.teacher_top is not None:
            return TeacherTopK(*batch.teacher_top, tail=self.tail), []
        if batch.teacher_cross is not None:
            cross, bias, entropy = batch.teacher_cross
            return TeacherCrossTerm(cross, bias, entropy, self.weights.temperature), []
        return self.teacher_head(batch, layers)

    def teacher_head(
        self, batch: LanguageBatch, layers: tuple[int, ...] = ()
    ) -> tuple[TeacherHead | None, list[Tensor]]:
        """The teacher's full distribution, from the cache or computed now, and the given layers."""
        if self.teacher is None:
            return None, []
        if batch.teacher_hidden is not None:
            return self.teacher.with_hidden(batch.teacher_hidden), []
        hidden, found = self.teacher.hidden(batch, layers)
        return self.teacher.with_hidden(hidden), found

    def feature_loss(
        self, layers: list[Tensor], teacher_layers: list[Tensor], batch: LanguageBatch
    ) -> Tensor:
        """Sum over counted tokens of the mean over widths and layer pairs of the squared differences."""
        mask = batch.labels != IGNORED
        total = layers[0].new_zeros((), dtype=torch.float32)
        for projection, ours, theirs in zip(self.projections, layers, teacher_layers, strict=True):
            assert isinstance(projection, nn.Linear)
            value = projection_mse(
                ours, theirs, projection.weight, projection.bias, mask=mask, reduction="sum"
            )
            total = total + value / projection.out_features
        return total / len(self.pairs)


def gather_ragged(values: Tensor, accelerator: Accelerator) -> Tensor:
    """(sum of n,) of every process's (n,), in order of the processes."""
    if accelerator.num_processes == 1:
        return values
    sizes = accelerator.gather(torch.tensor([len(values)], device=values.device))
    longest = int(sizes.max())  # type: ignore[union-attr]
    padded = nn.functional.pad(values, (0, longest - len(values)))
    parts = accelerator.gather(padded[None])
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
