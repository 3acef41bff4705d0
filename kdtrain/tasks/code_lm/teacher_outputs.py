"""What a language model says of every token of the training rows, read from a teacher store.

A row of the store is a segment: the tokens of a document that packing lays into a row without a cut. Documents that share
a packed row do not see each other, so a segment has the same outputs in whatever row it is packed.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from kdtrain.console import say
from kdtrain.data.tokens import TokenRows, epoch_batches
from kdtrain.errors import KdtrainError
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.outputs import Batch
from kdtrain.recipe import LanguageRecipe
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.served import AskedRows, ServedTeacher, ServedWork
from kdtrain.tasks.code_lm.targets import Target
from kdtrain.tasks.code_lm.work import LanguageWork, segments_of
from kdtrain.teacher_cache.build import Prepare, build
from kdtrain.teacher_cache.external import ExternalStore
from kdtrain.teacher_cache.shard import Keys, StoredRows, token_keys
from kdtrain.teacher_cache.store import Store
from kdtrain.teacher_cache.verify import spot_check

SAMPLED_ROWS = 1024
SPOT_CHECKED = 2
"""Stored segments that a server is asked once more before it fills the rest."""


@dataclass(frozen=True)
class TeacherRows:
    """Packed rows whose batches carry what a store holds of their tokens."""

    rows: PackedRows
    store: Store | None
    """None where servers are asked in every step"""
    segments: TokenRows
    first: Tensor
    """(rows + 1,) first segment of every row"""
    keys: Keys
    """of the segments"""
    stored: StoredRows | AskedRows
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
            if not isinstance(teacher, ServedTeacher):
                return LanguageWork(teacher, target, chosen, accelerator.device)
            for line in teacher.check(target):
                if accelerator.is_main_process:
                    say(line)
            return ServedWork(teacher, target, chosen, accelerator.device)

        if isinstance(teacher, ServedTeacher) and store.missing(keys):
            # Nothing but its answers tells one body from another.
            spot_check(store, keys, prepare, count=SPOT_CHECKED)

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


@dataclass(frozen=True)
class ServedRows(TeacherRows):
    """Packed rows whose batches carry what servers answer about their tokens, asked ahead of the step."""

    @classmethod
    def asked(
        cls,
        rows: PackedRows,
        teacher: ServedTeacher,
        target: Target,
        accelerator: Accelerator,
        recipe: LanguageRecipe,
        *,
        keep: bool,
    ) -> "ServedRows":
        """Rows of a run.

        Args:
            keep: whether a step reads its rows more than once.
        """
        segments, first = segments_of(rows)
        options, count = recipe.training, accelerator.num_processes
        steps = math.ceil(len(rows) / options.batch_size)
        epoch, plan = -1, []

        def segments_at(step: int) -> list[int]:
            nonlocal epoch, plan
            if (step - 1) // steps != epoch:
                epoch = (step - 1) // steps
                plan = epoch_batches(
                    rows.lengths,
                    options.batch_size,
                    recipe.seed,
                    epoch,
                    group_by_length=options.group_by_length,
                )
            parts = plan[(step - 1) % steps].tensor_split(options.gradient_accumulation_steps * count)
            own = torch.cat(parts[accelerator.process_index :: count])
            return [number for row in own.tolist() for number in range(int(first[row]), int(first[row + 1]))]

        work = ServedWork(teacher, target, segments, accelerator.device)
        total = options.max_steps or math.ceil(options.num_train_epochs * steps)
        asked = AskedRows(work, segments_at, total, keep=keep)
        keys = token_keys(segments.tokens, segments.starts.numpy(), segments.lengths.numpy())
        return cls(rows, None, segments, first, keys, asked)

    def batch(
        self,
        index: Tensor,
        device: torch.device,
        *,
        step: int = 0,
        stored: bool = True,
        whole: Tensor | None = None,
    ) -> Batch:
        """The given rows, padded, with the answers of the servers."""
        assert isinstance(self.stored, AskedRows)
        if stored:
            self.stored.at(step)
        return super().batch(index, device, step=step, stored=stored, whole=whole)

    def waited(self) -> float:
        """Seconds that training has waited for servers since this was last asked."""
        assert isinstance(self.stored, AskedRows)
        return self.stored.waited()


def _padded(values: Tensor, inside: Tensor) -> Tensor:
    """(B, N, ...) from (tokens, ...): zeros where `inside` (B, N) is false."""
    out = values.new_zeros((*inside.shape, *values.shape[1:]))
    out[inside] = values
    return out
