"""What on-policy methods share: prompts out of a batch, continuations drawn from a model, and a batch made of both.

A draw depends on the seed of the run, the step, the row, and the place in the continuation. It does not depend on the
micro-batch, the process, or what was drawn before, so a resumed run draws the same tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import TopPLogitsWarper

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Needs, RunStudent, Step
from kdtrain.methods.kd import KDOptions, LogitTerms, Weight
from kdtrain.models.heads import body_of, head_of, reads_positions
from kdtrain.outputs import IGNORED, Batch
from kdtrain.recipe.base import FINITE, POSITIVE, Number, Whole

Nucleus = Annotated[Number, Field(gt=0, le=1)]
Positive = Annotated[Number, POSITIVE, FINITE]

PADDING = 0
"""A token that every model has; padding is never read."""


class SamplingOptions(KDOptions):
    """The terms of kd on rows of which the student wrote a part."""

    temperature: Positive = Field(default=1.0, description="T that softens both sides of the divergence")
    ce_weight: Weight = Field(default=0.0, description="weight of the cross entropy with the next token")
    max_new_tokens: Annotated[Whole, POSITIVE] = Field(
        default=128, description="longest continuation of a prompt, in tokens"
    )
    prompt_tokens: Annotated[Whole, POSITIVE] = Field(
        default=32,
        description="tokens of a document that are its prompt, where the data has no prompts of their own",
    )
    sampling_temperature: Positive = Field(
        default=1.0, description="temperature at which the student samples"
    )
    sampling_top_p: Nucleus = Field(
        default=1.0, description="the student samples from the likeliest tokens with this total probability"
    )


class OnPolicy(LogitTerms):
    """The terms of kd on rows that the student wrote; a subclass makes the batch."""

    tasks = frozenset({"code_lm"})

    def needs(self) -> Needs:
        """A teacher that reads what the student wrote."""
        return Needs(live=True)

    def attach(self, student: nn.Module, run: RunStudent) -> None:
        """Refuse a student that cannot sample, before anything is trained.

        Raises:
            KdtrainError: it has no end-of-text token, or prompts would fill all that it reads.
        """
        end_tokens(student)
        longest, tokens = longest_of(student), self.options.prompt_tokens
        if longest is not None and tokens >= longest:
            raise KdtrainError(
                f"method.prompt_tokens is {tokens}, and the student reads at most {longest} tokens, prompt and continuation "
                f"together; set method.prompt_tokens to {longest - 1} or less"
            )


@dataclass(frozen=True)
class Prompts:
    """The prompts of a micro-batch, padded on the left."""

    ids: Tensor
    """(R, P) int64"""
    mask: Tensor
    """(R, P) int64, 0 for padding"""
    numbers: Tensor
    """(R, 2) int64 on the host: the row of the data, and the number of the document in it"""
    lengths: Tensor
    """(R,) int64"""

    @classmethod
    def of(cls, batch: Batch, tokens: int) -> "Prompts":
        """One prompt for every document with a label: what comes before its first label, and at least `tokens` tokens.

        The last labelled token of a document is never a part of its prompt.
        """
        prompts, numbers = [], []
        for row, ids, labels, places in zip(
            batch.rows.tolist(), batch.input_ids, batch.labels.cpu(), batch.positions.cpu(), strict=True
        ):
            opens = [0, *(places[1:] == 0).nonzero().flatten().add(1).tolist(), len(places)]
            for number, (start, end) in enumerate(pairwise(opens)):
                counted = (labels[start:end] != IGNORED).nonzero().flatten()
                if len(counted):
                    first, last = int(counted[0]) + 1, int(counted[-1]) + 1
                    prompts.append(ids[start : start + max(first, min(tokens, last))])
                    numbers.append((row, number))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=batch.input_ids.device)
        width = int(lengths.max())
        ids = batch.input_ids.new_full((len(prompts), width), PADDING)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        return cls(ids, mask, torch.tensor(numbers), lengths)

    def uniforms(self, step: Step, count: int, stream: int = 0) -> Tensor:
        """(R, count) float64 in [0, 1): numbers of this step, row and document alone."""
        rows = []
        for row, number in self.numbers.tolist():
            rows.append(uniform(count, step.seed, step.number, row, number, stream))
        return torch.stack(rows).to(self.ids.device)

    def followed_by(self, new: Tensor, counts: Tensor) -> "Written":
        """The prompts with continuations: the first `counts` (R,) of the tokens `new` (R, n)."""
        width = int((self.lengths + counts).max())
        ids = new.new_full((len(new), width), PADDING)
        for i, (prompt, count) in enumerate(zip(self.lengths.tolist(), counts.tolist(), strict=True)):
            ids[i, :prompt] = self.ids[i, self.ids.shape[1] - prompt :]
            ids[i, prompt : prompt + count] = new[i, :count]
        return Written(ids, self.lengths, self.lengths + counts, self.numbers)


@dataclass(frozen=True)
class Written:
    """Prompts with their continuations, padded on the right."""

    ids: Tensor
    """(R, N) int64"""
    prompts: Tensor
    """(R,) int64, tokens of each prompt"""
    lengths: Tensor
    """(R,) int64, tokens of prompt and continuation"""
    numbers: Tensor
    """(R, 2) as `Prompts.numbers`"""

    def batch(self, like: Batch) -> Batch:
        """A micro-batch in which the continuations count."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        following = torch.cat([self.ids[:, 1:], torch.full_like(self.ids[:, :1], IGNORED)], dim=1)
        counted = (places >= self.prompts[:, None] - 1) & (places < self.lengths[:, None] - 1)
        return replace(
            like,
            input_ids=self.ids,
            labels=torch.where(counted, following, IGNORED),
            rows=self.numbers[:, 0],
            position_ids=places.expand_as(self.ids),
            attention_mask=None,
            token_weight=None,
            stored={},
        )


@dataclass
class Writer:
    """A model that reads tokens as they are decided, with its cache of keys and values."""

    model: Any
    temperature: float
    top_p: float
    uniforms: Tensor
    """(R, n) float64, one for each place of the continuation"""
    vocabulary: int
    """ids from here on are drawn by no model of the run, since another model does not have them"""
    autocast: bool = True
    cache: Any = None
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(R, C) int64, 0 for columns of the cache that are no part of the row"""

    def read(self, ids: Tensor, mask: Tensor, positions: Tensor, last: int) -> Tensor:
        """Append columns (R, n) to the cache; the scores (R, last, V) of what follows the last of them."""
        self.mask = torch.cat([self.mask, mask], dim=1) if self.mask.numel() else mask
        places = {"position_ids": positions} if reads_positions(self.model) else {}
        device = ids.device.type
        with torch.autocast(device, enabled=self.autocast and torch.is_autocast_enabled(device)):
            output = body_of(self.model)(
                input_ids=ids,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **places,
            )
            self.cache = output.past_key_values
            scores = head_of(self.model).logits(output.last_hidden_state[:, -last:])
        return scores[..., : self.vocabulary].float()

    def forget(self, columns: Tensor) -> None:
        """Take those of the last columns out of the rows for which `columns` (R, n) is False."""
        self.mask[:, self.mask.shape[1] - columns.shape[1] :] *= columns

    def draw(self, scores: Tensor, places: Tensor) -> Tensor:
        """(R,) tokens drawn from (R, V) scores, for these (R,) places of the continuation."""
        scores = scores / self.temperature
        if self.top_p < 1.0:
            scores = TopPLogitsWarper(self.top_p)(None, scores)  # type: ignore[arg-type]  # it reads the scores alone
        uniforms = self.uniforms.gather(1, places.clamp_max(self.uniforms.shape[1] - 1)[:, None])
        return drawn(scores, uniforms[:, 0])


def drawn(scores: Tensor, uniforms: Tensor) -> Tensor:
    """(R,) tokens of the distributions softmax(scores): where the cumulated probability exceeds (R,) uniforms."""
    sums = scores.double().softmax(dim=1).cumsum(dim=1)
    return (sums <= uniforms[:, None] * sums[:, -1:]).sum(dim=1).clamp_max(scores.shape[1] - 1)


@dataclass(frozen=True)
class Judge:
    """A teacher that reads what the student drafts and replaces tokens outside of its `top_k` by its own."""

    writer: Writer
    top_k: int
    block: int
    """tokens that the student drafts before the teacher reads them"""


def continued(
    prompts: Prompts, student: Writer, ends: Tensor, longest: int | None, judge: Judge | None = None
) -> tuple[Written, Tensor]:
    """What the student continues prompts with, token by token or, with a judge, block by block.

    In every block the student drafts tokens, and the judge accepts the longest prefix in its top-k and draws the token
    after it. Rejected columns stay in the caches and are masked, so rows of a batch need not agree on a length.

    Args:
        ends: int64 ids that end a row.
        longest: tokens of the longest row.

    Returns:
        The rows, and (2,) int64: tokens of the student that were accepted, and tokens in all.
    """
    block, limit = (1 if judge is None else judge.block), student.uniforms.shape[1]
    room = torch.full_like(prompts.lengths, limit)
    if longest is not None:
        room = room.clamp_max(longest - prompts.lengths)
    counts = torch.zeros_like(prompts.lengths)
    done = room <= 0
    new = prompts.ids.new_zeros(len(counts), limit + block + 1)
    ids, mask = prompts.ids, prompts.mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    tally = torch.zeros(2, dtype=torch.int64, device=counts.device)
    places = torch.arange(block + 1, device=counts.device)
    last_place = (longest or 1 << 30) - 1
    together = in_step(student.model)
    while not finished(done, together=together):
        pending, pending_mask, pending_positions = ids, mask, positions
        drafts = []
        for number in range(block):
            drafts.append(student.draw(student.read(ids, mask, positions, 1)[:, 0], counts + number))
            ids, mask = drafts[-1][:, None], torch.ones_like(ids[:, :1])
            positions = (prompts.lengths + counts + number).clamp_max(last_place)[:, None]
        draft = torch.stack(drafts, dim=1)
        accepted = torch.full_like(counts, block)
        decided = torch.cat([draft, draft[:, -1:]], dim=1)
        if judge is not None:
            columns = [pending, draft[:, :-1]]
            spread = [(prompts.lengths + counts)[:, None] + places[: block - 1]]
            scores = judge.writer.read(
                torch.cat(columns, dim=1),
                torch.cat([pending_mask, torch.ones_like(draft[:, :-1])], dim=1),
                torch.cat([pending_positions, *spread], dim=1).clamp_max(last_place),
                block,
            )
            kept = (scores.topk(min(judge.top_k, scores.shape[-1])).indices == draft[..., None]).any(-1)
            accepted = kept.int().cumprod(1).sum(1)
            rejected = accepted.clamp_max(block - 1)
            own = judge.writer.draw(scores[torch.arange(len(draft)), rejected], counts + rejected)
            decided = torch.where(places == accepted[:, None], own[:, None], decided)
        fresh = torch.where(accepted == block, block, accepted + 1)
        stops = torch.isin(decided, ends) & (places < fresh[:, None])
        fresh = torch.where(stops.any(1), stops.int().argmax(1) + 1, fresh)
        fresh = torch.minimum(fresh, room - counts).masked_fill(done, 0)
        tally += torch.stack([torch.minimum(accepted, fresh).sum(), fresh.sum()])
        new.scatter_(1, counts[:, None] + places, decided)
        valid = places[:block] < fresh.clamp_min(1)[:, None]
        for writer in [student] + ([] if judge is None else [judge.writer]):
            writer.forget(valid & ~done[:, None])
        counts = counts + fresh
        done = done | (stops & (places < fresh[:, None])).any(1) | (counts >= room)
        ids = new.gather(1, (counts - 1).clamp_min(0)[:, None])
        mask = torch.ones_like(ids)
        positions = (prompts.lengths + counts - 1).clamp_max(last_place)[:, None]
    return prompts.followed_by(new, counts), tally


def finished(done: Tensor, *, together: bool) -> bool:
    """Whether all rows are done; `together`: those of all processes."""
    flag = done.all().int()
    if together:
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
    return bool(flag)


def in_step(model: Any) -> bool:
    """Whether every process has to run a model equally often, since FSDP2 has sharded it."""
    return distributed.is_initialized() and any(isinstance(one, DTensor) for one in model.parameters())


def end_tokens(model: Any) -> list[int]:
    """The ids after which a model stops.

    Raises:
        KdtrainError: its configuration names none.
    """
    given = getattr(model.config.get_text_config(), "eos_token_id", None)
    if given is None:
        raise KdtrainError(
            "the student has no end-of-text token to stop sampling at; set eos_token_id in the config.json of student.path, "
            "or give a new student a tokenizer that has one (student.tokenizer)"
        )
    return [given] if isinstance(given, int) else list(given)


def longest_of(*models: Any) -> int | None:
    """Tokens of the longest row that all models read; None where none of them has a limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


def write(
    batch: Batch,
    options: SamplingOptions,
    step: Step,
    student: Any,
    teacher: Any,
    judge: Callable[[Prompts, int], Judge] | None = None,
) -> tuple[Written, Tensor]:
    """Every document of a micro-batch as its prompt and a continuation; runs inside the wrapped forward.

    Args:
        teacher: reads the rows later, and bounds their tokens and lengths.
        judge: makes a judge for prompts and a number of shared tokens.

    Returns:
        As `continued`.
    """
    models = [student] if teacher is None else [student, teacher]
    vocabulary = min(len(head_of(model).weight) for model in models)
    longest = longest_of(*models)
    prompts = Prompts.of(batch, options.prompt_tokens)
    uniforms = prompts.uniforms(step, options.max_new_tokens)
    writer = Writer(
        student, options.sampling_temperature, options.sampling_top_p, uniforms, vocabulary=vocabulary
    )
    ends = torch.tensor(end_tokens(student), device=uniforms.device)
    return continued(prompts, writer, ends, longest, None if judge is None else judge(prompts, vocabulary))


def uniform(count: int, *key: int) -> Tensor:
    """(count,) float64 in [0, 1), a function of the key alone."""
    seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest())
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
