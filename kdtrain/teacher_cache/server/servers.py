"""A teacher that vLLM servers run: its hidden states (exact) or its top-k log-probabilities, token by token.

    with TeacherServers(["http://127.0.0.1:8000"], model="Qwen/Qwen2.5-Coder-7B") as servers:
        for hidden in servers.hidden(pieces):             # (n, D) of every piece, in the order of the pieces
            ...

Hidden states come from `/pooling` of a server started with `--runner pooling`: they are the output of the final norm, so
`kdkernels.TeacherHead` makes the full distribution of them. Log-probabilities come from `/v1/completions`.
`kdtrain serve-command RECIPE` prints the command that starts a server for either.
"""

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.teacher_cache.server.ahead import Ahead, Piece
from kdtrain.teacher_cache.server.answers import (
    WireDtype,
    completion_request,
    pooling_request,
    states_of,
    top_k_of,
)
from kdtrain.teacher_cache.server.connection import Connection, Traffic

Answer = TypeVar("Answer")

AHEAD_TOKENS = 1 << 16
"""Tokens that `hidden` and `top_k` ask at most ahead of the reader."""
FIRST_PATIENCE = 1.0
"""Seconds for the first answer: a wrong address is told at once."""


@dataclass(frozen=True)
class ServedModel:
    """What a server says of the model."""

    name: str
    root: str
    """path or hub id that the server loaded"""
    max_length: int
    """tokens of the longest piece of text, a generated token included"""


class TeacherServers:
    """One teacher on one or several vLLM servers.

    Args:
        urls: addresses of the servers, such as `http://127.0.0.1:8000`; each request goes to the one with the fewest
            requests in flight.
        model: name that the servers serve the model by; None takes the only one they serve.
        in_flight: requests at a time for each server; the server batches them.
        timeout: seconds that one answer may take.
        patience: seconds during which a failing request is sent again before the run ends, in place of `PATIENCE`.

    Raises:
        KdtrainError: a server does not answer, or the servers serve different models.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None = None,
        in_flight: int = 8,
        timeout: float = 120.0,
        patience: float | None = None,
    ) -> None:
        self.connection = Connection(urls, in_flight=in_flight, timeout=timeout, patience=patience)
        self.urls = self.connection.urls
        try:
            self.model = self._served(model)
        except KdtrainError:
            self.close()
            raise

    @property
    def traffic(self) -> Traffic:
        """What went over the wire so far."""
        return self.connection.traffic

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- what the servers are

    def _served(self, name: str | None) -> ServedModel:
        found = []
        for url in self.urls:
            answer = self._now(url, lambda one: self.connection.json("GET", one, "/v1/models"))
            listed = answer.get("data")
            models = {str(one.get("id")): one for one in listed or [] if isinstance(one, dict)}
            if name is None and len(models) != 1:
                raise KdtrainError(
                    f"{url} serves {', '.join(models) or 'no model'}; name one of them in teacher.served_name"
                )
            wanted = name if name is not None else next(iter(models))
            if wanted not in models:
                raise KdtrainError(
                    f"{url} serves {', '.join(models) or 'no model'} and not {wanted}; set teacher.served_name, or start the server "
                    "with that model (kdtrain serve-command prints the command)"
                )
            length = models[wanted].get("max_model_len")
            if not isinstance(length, int) or length < 2:
                raise KdtrainError(
                    f"{url}/v1/models names no max_model_len for {wanted}; teacher.url must name a vLLM server"
                )
            found.append(ServedModel(wanted, str(models[wanted].get("root")), length))
        if len({one.name for one in found}) > 1:
            names = ", ".join(f"{url}: {one.name}" for url, one in zip(self.urls, found, strict=True))
            raise KdtrainError(
                f"the servers of teacher.url serve different models ({names}); name one in teacher.served_name"
            )
        return ServedModel(found[0].name, found[0].root, min(one.max_length for one in found))

    def _now(self, url: str, ask: Callable[[str], Answer]) -> Answer:
        """Ask one server before anything runs; a server that does not answer is told after a second."""
        began = self.connection.traffic.requests
        try:
            return self.connection.patiently(ask, [url], patience=FIRST_PATIENCE)
        except KdtrainError as error:
            if "did not answer for" not in str(error):
                raise
            reached = "" if self.connection.traffic.requests > began else "start the server, or correct "
            raise KdtrainError(
                f"{str(error).partition('; look at')[0]}; {reached or 'look at the server, or correct '}teacher.url"
            ) from None

    @cached_property
    def pooling(self) -> tuple[str, ...]:
        """The servers that answer hidden states."""
        return tuple(url for url in self.urls if self._has(url, "/pooling"))

    @cached_property
    def generating(self) -> tuple[str, ...]:
        """The servers that answer log-probabilities."""
        return tuple(url for url in self.urls if self._has(url, "/v1/completions"))

    def only(self, url: str) -> "TeacherServers":
        """The same teacher on one of the servers, over the same connection."""
        one = copy.copy(self)
        one.urls = (url,)
        for kind in ("pooling", "generating"):
            vars(one)[kind] = tuple(each for each in getattr(self, kind) if each == url)
        return one

    def _has(self, url: str, path: str) -> bool:
        """Whether a server serves this path: an empty request is refused otherwise than one to nowhere."""
        return self._now(url, lambda one: self.connection.exists(one, path))

    def check_tokens(self, text: str, expected: Sequence[int]) -> None:
        """Compare the server's tokens of a text with ours.

        Raises:
            KdtrainError: they differ; names the first place.
        """
        body = {"model": self.model.name, "prompt": text, "add_special_tokens": False}
        for url in self.urls:
            answer = self._now(url, lambda one: self.connection.json("POST", one, "/tokenize", body))
            tokens = answer.get("tokens")
            if not isinstance(tokens, list):
                raise KdtrainError(
                    f"{url}/tokenize answered without tokens; teacher.url must name a vLLM server"
                )
            if tokens != list(expected):
                place = next(
                    (i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]),
                    min(len(tokens), len(expected)),
                )
                ours = expected[place] if place < len(expected) else "nothing"
                theirs = tokens[place] if place < len(tokens) else "nothing"
                raise KdtrainError(
                    f"the tokenizer of {url} differs from the one of teacher.path: token {place} of a sample is {theirs} there and "
                    f"{ours} here; name in teacher.path what the server serves"
                )

    # ---- what the teacher computes

    def hidden(
        self, pieces: Iterable[Sequence[int]], *, dtype: WireDtype = "bfloat16"
    ) -> Generator[Tensor, None, None]:
        """Hidden states after the final norm, for the head of the teacher.

        Args:
            pieces: token ids of each piece of text; read ahead by `AHEAD_TOKENS`, no further.
            dtype: how states travel; the server rounds to it.

        Yields:
            (n, D) of each piece, in the order of the pieces, in `dtype`.

        Raises:
            KdtrainError: the server refuses, or its answer is not one state for each token.
        """
        yield from self._ordered(pieces, lambda ids: self.states(ids, dtype))

    def top_k(self, pieces: Iterable[Sequence[int]], k: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The k most likely next tokens after every token, at temperature 1.

        Args:
            pieces: token ids of each piece of text.
            k: entries of each distribution; the server must allow as many (`--max-logprobs`).

        Yields:
            Log-probabilities (n, k) float32 and token ids (n, k) int64 of each piece, most likely first. Entry i is the
            distribution of what follows token i, the last one included.

        Raises:
            KdtrainError: the server refuses, or its answer does not hold k entries for each token.
        """
        yield from self._ordered(pieces, lambda ids: self.likeliest(ids, k))

    def states(self, ids: Sequence[int], dtype: WireDtype) -> Tensor:
        """(n, D), the hidden states of one piece."""
        self._check_length(ids, self.model.max_length)
        body = pooling_request(self.model.name, ids, dtype)

        def ask(url: str) -> Tensor:
            return states_of(self.connection.send("POST", url, "/pooling", body), url, ids, dtype)

        return self.connection.patiently(ask, self.pooling or self.urls, tokens=len(ids))

    def likeliest(self, ids: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
        """(n, k) twice, the entries of one piece."""
        self._check_length(ids, self.model.max_length - 1)  # one token is generated
        body = completion_request(self.model.name, ids, k)

        def ask(url: str) -> tuple[Tensor, Tensor]:
            return top_k_of(self.connection.json("POST", url, "/v1/completions", body), url, ids, k)

        return self.connection.patiently(ask, self.generating or self.urls, tokens=len(ids))

    def _check_length(self, ids: Sequence[int], longest: int) -> None:
        if len(ids) > longest:
            raise KdtrainError(
                f"a piece of {len(ids)} tokens is longer than the {longest} that {self.model.name} at {self.urls[0]} answers; lower "
                "data.max_length, or start the server with a larger --max-model-len"
            )

    def _ordered(
        self, pieces: Iterable[Sequence[int]], ask: Callable[[Sequence[int]], Answer]
    ) -> Generator[Answer, None, None]:
        with Ahead(ask, workers=self.connection.workers, tokens=AHEAD_TOKENS) as ahead:
            numbered = (Piece(number, ids) for number, ids in enumerate(pieces))
            waiting: list[Piece] = []

            def coming() -> Generator[Piece, None, None]:
                for piece in numbered:
                    waiting.append(piece)
                    yield piece

            ahead.expect(coming())
            while waiting:
                yield ahead.take(waiting.pop(0))
