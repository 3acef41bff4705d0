"""A language teacher whose body runs on vLLM servers; of its weights only the head is here.

`ServedWork` fills a teacher store like any teacher. `AskedRows` is for training without a store: the servers are asked
ahead of the step, so that they work while the student trains.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from kdtrain.data.tokens import TokenRows
from kdtrain.errors import KdtrainError
from kdtrain.models.head_file import empty_model, read_head
from kdtrain.models.language_student import SAMPLE_CODE
from kdtrain.models.language_teacher import DTYPES, LanguageTeacher
from kdtrain.models.loading import load_tokenizer
from kdtrain.recipe import LanguageTeacherSection
from kdtrain.tasks.code_lm.targets import Target
from kdtrain.tasks.code_lm.work import LanguageWork
from kdtrain.teacher_cache.server.ahead import Ahead, Piece
from kdtrain.teacher_cache.server.answers import WireDtype
from kdtrain.teacher_cache.server.checks import check_hidden, check_top_k
from kdtrain.teacher_cache.server.servers import TeacherServers
from kdtrain.teacher_cache.shard import Ragged

AHEAD_BYTES = 512e6
"""Answers that are at most waiting to be read, on every process."""
PROBE_TOKENS = 24

Answer = tuple[Tensor, ...]
"""(n, D) hidden states, or log-probabilities and ids (n, K), of one piece of text"""


@dataclass(frozen=True)
class ServedTeacher(LanguageTeacher):
    """A teacher on servers, as far as it is here: tokenizer, configuration, head."""

    section: LanguageTeacherSection
    max_length: int
    """tokens of a row (data.max_length)"""
    runs_here: ClassVar[bool] = False

    @classmethod
    def load(cls, section: LanguageTeacherSection, max_length: int, *, head: bool) -> "ServedTeacher":
        """Read configuration and tokenizer, and the head where states are asked for; no server is asked.

        Raises:
            KdtrainError: they cannot be read from teacher.path.
        """
        assert section.path is not None
        model = empty_model(section.path, "teacher.path", DTYPES[section.precision])
        if head:
            read_head(model, section.path, "teacher.path")
        return cls(section.path, model, load_tokenizer(section.path, "teacher.path"), section, max_length)

    @cached_property
    def weights_hash(self) -> str:
        """Of what is here, the head and the configuration; the body is known by its answers (see `Store`)."""
        digest = hashlib.sha256(f"served {self.model.config.to_json_string()}\n".encode())
        for tensor in (self.head.weight, self.head.bias):
            if tensor is not None and not tensor.is_meta:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def place(self, accelerator: Accelerator) -> None:
        """Move the head to this process's device."""
        self.move_head(accelerator.device)

    def move_head(self, device: torch.device) -> None:
        """Move the head to a device."""
        layer = self.model.get_output_embeddings()
        assert layer is not None
        layer.to(device)

    def release(self) -> None:
        """There are no layers to give up."""

    @cached_property
    def servers(self) -> TeacherServers:
        """The servers, connected when they are first needed.

        Raises:
            KdtrainError: none is named, or one does not answer.
        """
        return TeacherServers(
            [url for url in (self.section.url or "").replace(",", " ").split() if url],
            model=self.section.served_name,
        )

    def close(self) -> None:
        """Let go of the servers."""
        if "servers" in vars(self):
            self.servers.close()

    def check(self, target: Target) -> list[str]:
        """Compare the servers with the recipe; what was found, for people.

        Raises:
            KdtrainError: they serve something else; names the URL and the flag or field that mends it.
        """
        for text in SAMPLE_CODE:
            self.servers.check_tokens(text, self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = self.tokenizer("".join(SAMPLE_CODE), add_special_tokens=False)["input_ids"]
        probe = ids[:PROBE_TOKENS]
        longest = list(itertools.islice(itertools.cycle(ids), self.max_length))
        if self.asks_top_k(target):
            return check_top_k(self.servers, probe, longest, target.spec.tensors["logprobs"].shape[0])
        return check_hidden(
            self.servers, self.logprobs, self.head.weight.shape[1], probe, longest, self.section.precision
        )

    def logprobs(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 of hidden states (n, D), on the host."""
        weight = self.head.weight
        logits = self.head.logits(hidden.to(weight.device, weight.dtype))
        return logits.float().log_softmax(-1).cpu()

    @staticmethod
    def asks_top_k(target: Target) -> bool:
        """Whether the servers answer log-probabilities, and not the states from which everything else follows."""
        return target.kind == "topk"

    def wire_dtype(self, target: Target) -> WireDtype:
        """How states travel: as they are stored, or as they were computed."""
        if target.kind == "hidden":
            return "bfloat16" if target.spec.dtype == "bfloat16" else "float32"
        return "bfloat16" if self.section.precision == "bf16" else "float32"

    def asking(self, target: Target) -> Ahead[Answer]:
        """Asks the servers for what a target needs, ahead of the reader."""
        servers = self.servers
        ask: Callable[[Sequence[int]], Answer]
        if self.asks_top_k(target):
            k = target.spec.tensors["logprobs"].shape[0]
            size = 12 * k
            ask = lambda ids: servers.likeliest(ids, k)  # noqa: E731
        else:
            dtype = self.wire_dtype(target)
            size = getattr(torch, dtype).itemsize * self.head.weight.shape[1]
            ask = lambda ids: (servers.states(ids, dtype),)  # noqa: E731
        tokens = max(1, int(AHEAD_BYTES // size))
        return Ahead(ask, workers=servers.connection.workers, tokens=tokens)

    @torch.no_grad()
    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The input of the head, (B, N, D_t), asked for now: for text that nothing was asked ahead of, such as sampled text.

        Raises:
            KdtrainError: inner layers, which a server does not answer.
        """
        if layers:
            raise KdtrainError(
                "a teacher on a server answers no inner layers; set teacher.source: local, or choose a method that reads none"
            )
        flat = input_ids.flatten().tolist()
        starts = (position_ids == 0).flatten().nonzero().squeeze(1).tolist()
        pieces = [flat[first:end] for first, end in zip(starts, [*starts[1:], len(flat)], strict=True)]
        dtype: WireDtype = "bfloat16" if self.section.precision == "bf16" else "float32"
        states = torch.cat(list(self.servers.hidden(pieces, dtype=dtype)))
        return states.to(input_ids.device).unflatten(0, input_ids.shape), []


class ServedWork(LanguageWork):
    """Segments that servers compute, for `kdtrain.teacher_cache.build`."""

    def __init__(
        self, teacher: ServedTeacher, target: Target, segments: TokenRows, device: torch.device
    ) -> None:
        self.teacher, self.target, self.segments, self.device = teacher, target, segments, device
        self.servers = teacher.servers
        self.ahead = teacher.asking(target)
        if target.frozen is not None:
            teacher.move_head(device)

    def expect(self, batches: Sequence[Tensor]) -> None:
        """Ask for these batches, in this order, ahead of `compute`."""
        self.ahead.expect(self.piece(row) for rows in batches for row in rows.tolist())

    def piece(self, row: int, *, step: int = 0) -> Piece:
        """A segment by number; `step` tells apart the times that it is asked for."""
        first, size = int(self.segments.starts[row]), int(self.segments.lengths[row])
        return Piece((step, row), self.segments.tokens[first : first + size].tolist())

    @torch.inference_mode()
    def compute(self, rows: Tensor, names: Sequence[str], indices: Tensor | None = None) -> dict[str, Ragged]:
        """These tensors of these segments, on the host; see `kdtrain.teacher_cache.build.Work`."""
        found = self.tensors([self.ahead.take(self.piece(row)) for row in rows.tolist()])
        if indices is not None:
            found["logprobs"] = looked_up(found, indices)
        lengths = self.segments.lengths[rows]
        return {name: Ragged(found[name].cpu(), lengths) for name in names}

    def tensors(self, answers: Sequence[Answer]) -> dict[str, Tensor]:
        """All tensors of the target, of pieces end to end."""
        parts = [torch.cat(part) for part in zip(*answers, strict=True)]
        if len(parts) == 1:
            head = self.teacher.head.weight
            return self._targets(
                parts[0] if self.target.kind == "hidden" else parts[0].to(head.device, head.dtype), None
            )
        logprobs, ids = parts
        shared = self.target.spec.vocabulary
        assert shared is not None
        logprobs = logprobs.masked_fill(ids >= shared, -torch.inf)
        if bool(logprobs.isneginf().all(-1).any()):
            raise KdtrainError(
                f"the student has none of the {ids.shape[1]} most likely tokens that {self.servers.urls[0]} answers; raise teacher.top_k"
            )
        return {"logprobs": logprobs, "indices": free_ids(ids, shared).int()}

    def note(self) -> str:
        """Tokens/s and bytes/s, for the progress bar."""
        return self.servers.traffic.line()

    def close(self) -> None:
        """Ask for nothing more."""
        self.ahead.close()


def free_ids(ids: Tensor, shared: int) -> Tensor:
    """(n, K) with every id at or above `shared` replaced by one that the row does not name yet."""
    outside = ids >= shared
    if not bool(outside.any()):
        return ids
    ids = ids.clone()
    for row in outside.any(-1).nonzero().flatten().tolist():
        taken = set(ids[row].tolist())
        unused = (number for number in range(shared) if number not in taken)
        for place in outside[row].nonzero().flatten().tolist():
            ids[row, place] = next(unused)
    return ids


def looked_up(found: dict[str, Tensor], indices: Tensor) -> Tensor:
    """Log-probabilities of these ids (n, K); an id that was not answered is at most as likely as the last that was."""
    matches = indices[:, :, None] == found["indices"][:, None, :]
    values = torch.where(matches, found["logprobs"][:, None, :], -torch.inf).amax(-1)
    least = found["logprobs"].masked_fill(found["logprobs"].isneginf(), 0.0).amin(-1, keepdim=True)
    return torch.where(matches.any(-1), values, least.expand_as(values))


class AskedRows:
    """What servers answer about segments, asked ahead of the optimizer step that reads it; in place of `StoredRows`.

    Args:
        segments_at: numbers of the segments that this process reads in an optimizer step, 1 for the first, in order.
        last: the last optimizer step.
        keep: whether a step reads its answers more than once.
    """

    def __init__(
        self, work: ServedWork, segments_at: Callable[[int], Sequence[int]], last: int, *, keep: bool
    ) -> None:
        self.work, self.segments_at, self.last, self.keep = work, segments_at, last, keep
        self.step: int | None = None
        self._kept: dict[int, Answer] = {}
        self._reported = 0.0

    def at(self, step: int) -> None:
        """From now on this optimizer step reads."""
        if step == self.step:
            return
        if self.step is None or step != self.step + 1:
            self.work.ahead.expect(self._coming(step))
        else:
            self.work.ahead.forget(lambda key: isinstance(key, tuple) and key[0] < step)
        self.step = step
        self._kept.clear()

    def _coming(self, step: int) -> Iterator[Piece]:
        for number in range(step, self.last + 1):
            for segment in self.segments_at(number):
                yield self.work.piece(segment, step=number)

    def batch(self, rows: Tensor | Sequence[int], names: Sequence[str] | None = None) -> dict[str, Ragged]:
        """The tensors of these segments."""
        numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        answers = []
        for number in numbers:
            answer = self._kept.get(number)
            if answer is None:
                answer = self.work.ahead.take(self.work.piece(number, step=self.step or 0))
                if self.keep:
                    self._kept[number] = answer
            answers.append(answer)
        with torch.inference_mode():
            found = self.work.tensors(answers)
        lengths = self.work.segments.lengths[numbers]
        return {name: Ragged(found[name].clone(), lengths) for name in names or found}

    def waited(self) -> float:
        """Seconds that training has waited for servers since this was last asked."""
        total = self.work.ahead.waited
        since, self._reported = total - self._reported, total
        return since
