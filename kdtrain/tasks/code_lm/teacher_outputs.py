"""What a language model says of every token of the training rows, read from a teacher store.

A row of the store is a segment: the tokens of a document that packing lays into a row without a cut. Documents that share
a packed row do not see each other, so a segment has the same outputs in whatever row it is packed.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkernels import teacher_cross_term
from kdtrain.console import say
from kdtrain.data.tokens import TokenRows
from kdtrain.errors import KdtrainError
from kdtrain.models.heads import Head, head_of
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.outputs import Batch
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.recipe import LanguageRecipe, LanguageTeacherRecipe
from kdtrain.teacher_cache.build import Prepare, build
from kdtrain.teacher_cache.external import ExternalStore
from kdtrain.teacher_cache.store import Element, Keys, Ragged, Store, StoredRows, StoreSpec, token_keys

Kind = Literal["hidden", "topk", "cross_term"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_TOKENS = 512
"""Tokens whose logits are in memory at a time."""
SAMPLED_ROWS = 1024


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """A student's head in the precision of the matmuls of a step, and the temperature of its loss."""

    weight: Tensor
    """(V_s, D_s)"""
    bias: Tensor | None
    temperature: float

    @classmethod
    def of(cls, student: PreTrainedModel, recipe: LanguageRecipe) -> "FrozenHead":
        """The student's head in the precision of training.

        Raises:
            KdtrainError: it is trained, or caps its logits.
        """
        head = head_of(student)
        if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
            raise KdtrainError(
                "teacher.signal cross_term is stored for one head of the student, which training would change; set "
                "student.frozen_head: true (or student.lora_rank), or teacher.signal: hidden"
            )
        if head.softcap is not None:
            raise KdtrainError(
                f"teacher.signal cross_term needs logits that are linear in the hidden states, but the student caps its own "
                f"at {head.softcap}; set teacher.signal: hidden"
            )
        dtype = DTYPES[recipe.training.precision]
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        return cls(head.weight.detach().to(dtype), bias, recipe.method.temperature)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over its numbers."""
        digest = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Target:
    """What is stored of every token."""

    kind: Kind
    spec: StoreSpec
    frozen: FrozenHead | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        teacher: LanguageTeacher,
        recipe: LanguageTeacherRecipe,
        *,
        shared: int | None = None,
        frozen: FrozenHead | None = None,
    ) -> "Target":
        """What the teacher section of a recipe asks for.

        Args:
            shared: ids 0 to shared - 1 mean the same token to student and teacher; None when all do.
            frozen: the student's head, for a cross-term.
        """
        size, width = teacher.head.weight.shape
        shared = size if shared is None else shared
        pinned: dict[str, object] = {} if kind == "hidden" else {"vocabulary": shared}
        if kind == "hidden":
            tensors = {"hidden": Element(recipe.dtype, (width,))}
            pinned["dtype"] = recipe.dtype
        elif frozen is not None:
            tensors = {
                "cross": Element("float32", (frozen.weight.shape[1],)),
                "bias": Element("float32", ()),
                "entropy": Element("float32", ()),
            }
            pinned |= {"student_head": frozen.fingerprint, "temperature": frozen.temperature}
        else:
            top_k = recipe.top_k
            if top_k > shared:
                raise KdtrainError(
                    f"teacher.top_k is {top_k}, but the teacher has {shared} tokens only that the student knows"
                )
            if top_k == shared and recipe.tail == "bucket":
                raise KdtrainError(
                    f"teacher.top_k keeps all {shared} tokens and leaves nothing for teacher.tail bucket; set it to renormalize"
                )
            tensors = {"logprobs": Element("float32", (top_k,)), "indices": Element("int32", (top_k,))}
            pinned["top_k"] = top_k
        spec = StoreSpec(
            teacher=teacher.path,
            teacher_weights=teacher.weights_hash,
            precision=recipe.precision,
            tensors=tensors,
            **pinned,  # type: ignore[arg-type]
        )
        return cls(kind, spec, frozen)

    @classmethod
    def for_run(
        cls,
        kind: Kind,
        teacher: LanguageTeacher,
        student: PreTrainedModel,
        shared: int,
        recipe: LanguageRecipe,
    ) -> "Target":
        """What a run with this student stores of the teacher, with whom it shares ids 0 to shared - 1."""
        rows = head_of(student).weight.shape[0]
        if kind == "cross_term" and rows > shared:
            raise KdtrainError(
                f"the student's head has {rows} rows, of which the teacher shares {shared}; a cross-term would compare over "
                "all of them and not, as the teacher itself would, over the shared ones; set teacher.signal: hidden"
            )
        frozen = FrozenHead.of(student, recipe) if kind == "cross_term" else None
        return cls.of(kind, teacher, recipe.teacher, shared=shared, frozen=frozen)

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return sum(element.bytes for element in self.spec.tensors.values())

    def describe(self) -> str:
        """For people."""
        return ", ".join(
            f"{name}: {' '.join([*map(str, element.shape), element.dtype])}"
            for name, element in self.spec.tensors.items()
        )


class LanguageWork:
    """Segments in front of the teacher, for `kdtrain.teacher_cache.build`."""

    def __init__(
        self, teacher: LanguageTeacher, target: Target, segments: TokenRows, device: torch.device
    ) -> None:
        self.teacher, self.target, self.segments, self.device = teacher, target, segments, device
        nn.Module.to(teacher.model, device)

    @property
    def costs(self) -> Tensor:
        """(R,) int64 tokens of each segment."""
        return self.segments.lengths

    def elements(self, name: str) -> Tensor:
        """(R,) int64: every tensor has one element for each token."""
        return self.segments.lengths

    @torch.inference_mode()
    def compute(self, rows: Tensor, names: Sequence[str], indices: Tensor | None = None) -> dict[str, Ragged]:
        """These tensors of these segments, on the host; see `kdtrain.teacher_cache.build.Work`."""
        ids, mask = (tensor.to(self.device) for tensor in self.segments.batch(rows))
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        hidden = self.teacher.hidden(ids, positions)[0][mask.bool()]
        lengths = self.segments.lengths[rows]
        found = self._targets(hidden, indices)
        return {name: Ragged(found[name].cpu(), lengths) for name in names}

    def _targets(self, hidden: Tensor, indices: Tensor | None) -> dict[str, Tensor]:
        """All tensors of the target for hidden states (tokens, D_t)."""
        if self.target.kind == "hidden":
            return {"hidden": hidden}
        head, shared = self.teacher.head, slice(self.target.spec.vocabulary)
        weight, bias = head.weight[shared], None if head.bias is None else head.bias[shared]
        if self.target.frozen is not None:
            student = self.target.frozen
            found = teacher_cross_term(
                replace(self.teacher.with_hidden(hidden), weight=weight, bias=bias),
                student.weight[shared].to(self.device),
                None if student.bias is None else student.bias[shared].to(self.device),
                temperature=student.temperature,
            )
            return {name: getattr(found, name) for name in ("cross", "bias", "entropy")}
        upcast = Head(weight.float(), None if bias is None else bias.float(), head.softcap, head.scale)
        logprobs, ids = [], []
        for first in range(0, len(hidden), HEAD_TOKENS):
            log_p = upcast.logits(hidden[first : first + HEAD_TOKENS].float()).log_softmax(-1)
            if indices is None:
                top = log_p.topk(self.target.spec.tensors["logprobs"].shape[0], dim=-1)
                logprobs.append(top.values)
                ids.append(top.indices)
            else:
                ids.append(indices[first : first + HEAD_TOKENS].to(self.device).long())
                logprobs.append(log_p.gather(-1, ids[-1]))
        return {"logprobs": torch.cat(logprobs), "indices": torch.cat(ids).int()}


def segments_of(rows: PackedRows) -> tuple[TokenRows, Tensor]:
    """The segments of packed rows in their order, and (rows + 1,) the number of the first one of every row."""
    opens = (rows.positions == 0).nonzero().squeeze(1)
    lengths = torch.diff(opens, append=torch.tensor([len(rows.tokens)]))
    first = torch.searchsorted(opens, rows.starts)
    return TokenRows(rows.tokens, opens, lengths, rows.pad_id), torch.cat([first, torch.tensor([len(opens)])])


@dataclass(frozen=True)
class TeacherRows:
    """Packed rows whose batches carry what a store holds of their tokens."""

    rows: PackedRows
    store: Store
    segments: TokenRows
    first: Tensor
    """(rows + 1,) first segment of every row"""
    keys: Keys
    """of the segments"""
    stored: StoredRows
    prepare: Prepare | None = None
    """of the teacher that the store is of, when it is here"""

    @classmethod
    def computed(
        cls,
        rows: PackedRows,
        folder: Path,
        teacher: LanguageTeacher,
        target: Target,
        accelerator: Accelerator,
        *,
        batch_tokens: int,
    ) -> "TeacherRows":
        """What the store at `folder` lacks of these rows is computed first; all processes take part.

        Raises:
            KdtrainError: the store is another teacher's, there is too little room, or another run writes there now.
        """
        segments, first = segments_of(rows)
        store = Store.open(folder, target.spec)
        keys = token_keys(segments.tokens, segments.starts.numpy(), segments.lengths.numpy())

        def prepare(numbers: np.ndarray) -> LanguageWork:
            chosen = replace(segments, starts=segments.starts[numbers], lengths=segments.lengths[numbers])
            return LanguageWork(teacher, target, chosen, accelerator.device)

        count = build(store, keys, prepare, accelerator, batch_tokens=batch_tokens)
        stored = store.rows(keys)
        if count and target.kind == "topk" and accelerator.is_main_process:
            sample = range(0, len(stored), max(1, len(stored) // SAMPLED_ROWS))
            covered = stored.batch(sample, ["logprobs"])["logprobs"].values.double().exp().sum(-1).mean()
            top_k = target.spec.top_k
            say(f"teacher cache: the top {top_k} entries hold {float(covered):.2%} of the probability")
        return cls(rows, store, segments, first, keys, stored, prepare)

    @classmethod
    def external(cls, rows: PackedRows, store: ExternalStore) -> "TeacherRows":
        """From a store that another program wrote.

        Raises:
            KdtrainError: segments that it does not hold.
        """
        segments, first = segments_of(rows)
        keys = token_keys(segments.tokens, segments.starts.numpy(), segments.lengths.numpy())
        missing = np.flatnonzero(~store.find("logprobs", keys)[2])
        if len(missing):
            start, length = int(segments.starts[missing[0]]), int(segments.lengths[missing[0]])
            words = store.tokenizer.decode(segments.tokens[start : start + length][:24].tolist())
            raise KdtrainError(
                f"{len(missing)} of {len(keys)} segments of the training documents are not in {store.folder}, the first is "
                f"{length} tokens long and begins with {words!r}; the shards have to hold the same documents in the "
                "same tokens, each with what the tokenizer puts in front and the end-of-text token at its end"
            )
        return cls(rows, store, segments, first, keys, store.rows(keys))

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of each row."""
        return self.rows.lengths

    def count(self, index: Tensor) -> int:
        """Labels that count in these rows."""
        return self.rows.count(index)

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows, padded, with what is stored of the teacher."""
        batch = self.rows.batch(index, device)
        if not stored:
            return batch
        bounds = zip(self.first[index].tolist(), self.first[index + 1].tolist(), strict=True)
        numbers = [number for first, end in bounds for number in range(first, end)]
        inside = torch.arange(batch.input_ids.shape[1]) < self.lengths[index][:, None]
        found = {name: _padded(values, inside) for name, (values, _) in self.stored.batch(numbers).items()}
        if "indices" in found:
            # Padding counts nowhere, but the ids of a token have to differ from each other.
            top_k = found["indices"].shape[-1]
            indices = torch.where(inside[..., None], found["indices"].long(), torch.arange(top_k))
            logprobs = found["logprobs"].float().masked_fill(~inside[..., None], -math.log(top_k))
            found = {"logprobs": logprobs, "indices": indices}
        return replace(batch, stored={"teacher": {name: value.to(device) for name, value in found.items()}})


def _padded(values: Tensor, inside: Tensor) -> Tensor:
    """(B, N, ...) from (tokens, ...): zeros where `inside` (B, N) is false."""
    out = values.new_zeros((*inside.shape, *values.shape[1:]))
    out[inside] = values
    return out
