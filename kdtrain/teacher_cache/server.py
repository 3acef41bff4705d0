"""A teacher that a vLLM server runs: its hidden states (exact) or its top-k log-probabilities, token by token.

    with TeacherServers(["http://127.0.0.1:8000"], model="Qwen/Qwen2.5-Coder-7B") as servers:
        for hidden in servers.hidden(pieces):             # (n, D) of every piece, in the order of the pieces
            ...

Hidden states come from `/pooling` of a server started with `--runner pooling`: they are the output of the final norm, so
`kdkernels.TeacherHead` makes the full distribution of them. Log-probabilities come from `/v1/completions`.
`kdtrain serve-command RECIPE` prints the command that starts a server for either.
"""

import json
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import httpx
import numpy as np
import torch
from torch import Tensor

from kdtrain.errors import KdtrainError

Answer = TypeVar("Answer")
WireDtype = Literal["float32", "bfloat16", "float16"]

API_KEY = "KDTRAIN_API_KEY"
"""The environment variable with the server's key; a key is never written to a recipe, a log or a manifest."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Busy(Exception):
    """A failure that may pass: the request is sent again."""


@dataclass
class Traffic:
    """What went over the wire so far."""

    tokens: int = 0
    received_bytes: int = 0
    requests: int = 0
    retries: int = 0
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """Tokens/s and bytes/s, as a progress bar shows them."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.tokens / seconds:.0f} tokens/s, {self.received_bytes / seconds / 1e6:.2f} MB/s"


@dataclass(frozen=True)
class ServedModel:
    """What a server says of its model."""

    name: str
    max_length: int
    """longest piece of text that it answers, in tokens"""


class TeacherServers:
    """One teacher on one or several vLLM servers.

    Args:
        urls: addresses of the servers, such as `http://127.0.0.1:8000`; each request goes to the one with the fewest
            requests in flight.
        model: name that the servers serve the model by; None takes the only one they serve.
        in_flight: requests at a time for each server; the server batches them.
        timeout: seconds that one answer may take.
        patience: seconds during which a failing request is sent again before the run ends.

    Raises:
        KdtrainError: no server answers, or the servers serve different models.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None = None,
        in_flight: int = 8,
        timeout: float = 120.0,
        patience: float = 300.0,
    ) -> None:
        if not urls:
            raise KdtrainError(
                "teacher.url names no server; give the address of one, such as http://127.0.0.1:8000"
            )
        self.urls = [_checked_url(url) for url in urls]
        self.in_flight, self.patience = in_flight, patience
        self.traffic = Traffic()
        key = os.environ.get(API_KEY)
        self.client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=10.0),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            limits=httpx.Limits(max_connections=in_flight * len(self.urls)),
            follow_redirects=False,
            trust_env=False,
        )
        self._lock = threading.Lock()
        self._waiting = dict.fromkeys(self.urls, 0)
        try:
            self.model = self._served(model)
        except KdtrainError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- what the servers are

    def _served(self, name: str | None) -> ServedModel:
        found = []
        for url in self.urls:
            answer = self._json("GET", url, "/v1/models", None)
            models = {str(one.get("id")): one for one in answer.get("data", []) if isinstance(one, dict)}
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
                    f"{url}/v1/models names no max_model_len for {wanted}; kdtrain reads vLLM's answer"
                )
            # A prompt needs room for one generated token.
            found.append(ServedModel(wanted, length - 1))
        if len({one.name for one in found}) > 1:
            names = ", ".join(f"{url}: {one.name}" for url, one in zip(self.urls, found, strict=True))
            raise KdtrainError(
                f"the servers of teacher.url serve different models ({names}); name one in teacher.served_name"
            )
        return ServedModel(found[0].name, min(one.max_length for one in found))

    def check_tokens(self, text: str, expected: Sequence[int]) -> None:
        """Compare the server's tokens of a text with ours.

        Raises:
            KdtrainError: they differ; names the first place.
        """
        body = {"model": self.model.name, "prompt": text, "add_special_tokens": False}
        for url in self.urls:
            tokens = self._json("POST", url, "/tokenize", body).get("tokens")
            if not isinstance(tokens, list):
                raise KdtrainError(f"{url}/tokenize answered without tokens; kdtrain reads vLLM's answer")
            if tokens != list(expected):
                place = next(
                    (i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]),
                    min(len(tokens), len(expected)),
                )
                ours = expected[place] if place < len(expected) else "nothing"
                theirs = tokens[place] if place < len(tokens) else "nothing"
                raise KdtrainError(
                    f"the tokenizer of {url} differs from the one of the recipe: token {place} of a sample is {theirs} there and "
                    f"{ours} here; name the server's tokenizer in student.tokenizer"
                )

    # ---- what the teacher computes

    def hidden(
        self, pieces: Iterable[Sequence[int]], *, dtype: WireDtype = "bfloat16"
    ) -> Generator[Tensor, None, None]:
        """Hidden states behind the final norm, for the teacher's head.

        Args:
            pieces: token ids of each piece of text; read ahead by the requests in flight, no further.
            dtype: how states travel; the server rounds to it.

        Yields:
            (n, D) of each piece, in the order of the pieces, in `dtype`.

        Raises:
            KdtrainError: the server refuses, or its answer is not one state for each token.
        """
        yield from self._ordered(pieces, lambda url, ids: self._pooled(url, ids, dtype))

    def top_k(self, pieces: Iterable[Sequence[int]], k: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The k likeliest next tokens of every token, at temperature 1.

        Args:
            pieces: token ids of each piece of text.
            k: entries of each distribution; the server must allow as many (`--max-logprobs`).

        Yields:
            Log-probabilities (n, k) float32 and token ids (n, k) int64 of each piece, likeliest first. Entry i is the
            distribution of what follows token i, the last one included.

        Raises:
            KdtrainError: the server refuses, or its answer does not hold k entries for each token.
        """
        yield from self._ordered(pieces, lambda url, ids: self._likeliest(url, ids, k))

    def _pooled(self, url: str, ids: Sequence[int], dtype: WireDtype) -> Tensor:
        body = {
            "model": self.model.name,
            "input": [list(ids)],
            "encoding_format": "bytes",
            "embed_dtype": dtype,
            "endianness": "little",
        }
        response = self._send("POST", url, "/pooling", body)
        try:
            described = json.loads(response.headers["metadata"])["data"][0]
            count, width = (int(size) for size in described["shape"])
            start, end = int(described["start"]), int(described["end"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise KdtrainError(
                f"{url}/pooling answered without the shape of its states; kdtrain reads answers of vLLM 0.32 and later with "
                "encoding_format bytes"
            ) from None
        content = response.content[start:end]
        if count != len(ids):
            raise KdtrainError(
                f"{url}/pooling answered {count} states for {len(ids)} tokens; start the server with --pooler-config "
                """'{"task":"token_embed","use_activation":false}' and without truncation or chunked prefill"""
            )
        if len(content) != count * width * BYTES[dtype]:
            raise _Busy(f"the answer ends after {len(content)} of {count * width * BYTES[dtype]} bytes")
        states = torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).reshape(count, width)
        if not bool(torch.isfinite(states).all()):
            raise KdtrainError(
                f"{url}/pooling answered states that are not finite; start the server with another --dtype"
            )
        return states

    def _likeliest(self, url: str, ids: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
        body = {
            "model": self.model.name,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": k,
            "logprobs": k,
            "return_tokens_as_token_ids": True,
        }
        choice = self._json("POST", url, "/v1/completions", body)["choices"][0]
        try:
            # Entry i of the prompt is about token i: the distribution after token i - 1.
            rows = [_ranked(entry, k) for entry in choice["prompt_logprobs"][1:]]
            rows.append(_generated(choice["logprobs"]["top_logprobs"][0], k))
        except (KeyError, IndexError, TypeError, ValueError):
            raise KdtrainError(
                f"{url}/v1/completions answered without prompt_logprobs of {k} entries; kdtrain reads answers of vLLM 0.32 and later"
            ) from None
        if len(rows) != len(ids):
            raise KdtrainError(
                f"{url}/v1/completions answered {len(rows)} distributions for {len(ids)} tokens"
            )
        table = np.array(rows, dtype=np.float64)  # (n, k, 2)
        if not np.isfinite(table).all():
            raise KdtrainError(
                f"{url}/v1/completions answered log-probabilities that are not finite; start the server with another --dtype"
            )
        return torch.from_numpy(table[..., 1].astype(np.float32)), torch.from_numpy(
            table[..., 0].astype(np.int64)
        )

    # ---- requests

    def _ordered(
        self, pieces: Iterable[Sequence[int]], ask: Callable[[str, Sequence[int]], Answer]
    ) -> Generator[Answer, None, None]:
        """Answers in the order of the pieces, a bounded number of requests ahead of the reader."""
        window = self.in_flight * len(self.urls)
        waiting: deque[Future[Answer]] = deque()
        pool = ThreadPoolExecutor(window, thread_name_prefix="teacher-server")
        try:
            for ids in pieces:
                if len(ids) > self.model.max_length:
                    raise KdtrainError(
                        f"a piece of {len(ids)} tokens is longer than the {self.model.max_length} that {self.model.name} answers "
                        "there; lower data.max_length, or start the server with a larger --max-model-len"
                    )
                waiting.append(pool.submit(self._patiently, ask, ids))
                if len(waiting) == window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _patiently(self, ask: Callable[[str, Sequence[int]], Answer], ids: Sequence[int]) -> Answer:
        """Ask the least busy server; again after a failure that may pass, with growing pauses."""
        ends, pause = time.monotonic() + self.patience, 0.25
        while True:
            with self._lock:
                url = min(self.urls, key=lambda one: self._waiting[one])
                self._waiting[url] += 1
            try:
                answer = ask(url, ids)
                with self._lock:
                    self.traffic.tokens += len(ids)
                return answer
            except _Busy as error:
                if time.monotonic() + pause > ends:
                    raise KdtrainError(
                        f"{url} did not answer for {self.patience:.0f} s: {error}; the same command continues where it stopped"
                    ) from None
                with self._lock:
                    self.traffic.retries += 1
            finally:
                with self._lock:
                    self._waiting[url] -= 1
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 10.0)

    def _json(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            response = self._send(method, url, path, body)
        except _Busy as error:
            if body is None or path == "/tokenize":
                raise KdtrainError(
                    f"{url} does not answer: {error}; is the server running, and is teacher.url right?"
                ) from None
            raise
        try:
            answer = response.json()
        except ValueError:
            raise _Busy(f"{path} answered something that is not JSON") from None
        if not isinstance(answer, dict):
            raise KdtrainError(
                f"{url}{path} answered {type(answer).__name__} and no object; kdtrain reads vLLM's answer"
            )
        return answer

    def _send(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """One request; failures that may pass are `_Busy`, others a sentence."""
        try:
            response = self.client.request(method, url + path, json=body)
        except httpx.ConnectError as error:
            raise _Busy(f"nothing listens there ({error})") from None
        except httpx.TimeoutException:
            raise _Busy(f"{path} took longer than {self.client.timeout.read:.0f} s") from None
        except httpx.TransportError as error:
            raise _Busy(f"the connection broke ({error or type(error).__name__})") from None
        with self._lock:
            self.traffic.requests += 1
            self.traffic.received_bytes += len(response.content)
        if response.status_code == 429 or response.status_code >= 500:
            raise _Busy(f"{path} answered {response.status_code}")
        if response.status_code != 200:
            raise KdtrainError(_refusal(url, path, response))
        return response


def _checked_url(url: str) -> str:
    parsed = httpx.URL(url) if isinstance(url, str) else httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise KdtrainError(
            f"teacher.url must look like http://127.0.0.1:8000, without credentials (they belong into {API_KEY}), got {url!r}"
        )
    return str(url).rstrip("/").removesuffix("/v1")


def _refusal(url: str, path: str, response: httpx.Response) -> str:
    """What a refused request means, with the flag or the field that mends it."""
    message = _message(response)
    if response.status_code in (401, 403):
        return f"{url} refuses the request ({response.status_code}); set the environment variable {API_KEY} to the server's key"
    if response.status_code == 404 and path == "/pooling":
        return (
            f"{url} has no /pooling: it was started to generate text; start it with --runner pooling (kdtrain serve-command prints the "
            "command), or set teacher.targets: topk"
        )
    if response.status_code == 404:
        return f"{url}{path} does not exist there (404: {message}); teacher.url must name a vLLM server"
    if "logprobs" in message and "max" in message:
        return f"{url} refuses teacher.top_k: {message}; start the server with a larger --max-logprobs, or lower teacher.top_k"
    if "context length" in message or "maximum model length" in message:
        return f"{url}: {message}; lower data.max_length, or start the server with a larger --max-model-len"
    return f"{url}{path} refuses the request ({response.status_code}): {message}"


def _message(response: httpx.Response) -> str:
    try:
        content = response.json()
        error = content.get("error", content)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _ranked(entry: dict[str, dict[str, Any]], k: int) -> list[tuple[int, float]]:
    """The k likeliest of one prompt token's entries; the token itself is an extra entry where its rank is beyond k."""
    ranked = sorted((int(one["rank"]), int(token), float(one["logprob"])) for token, one in entry.items())
    kept = [(token, logprob) for rank, token, logprob in ranked if rank <= k]
    if len(kept) != k:
        raise ValueError
    return kept


def _generated(entry: dict[str, float], k: int) -> list[tuple[int, float]]:
    """The k likeliest after the last token, from the one token that was generated."""
    ranked = sorted(
        ((-float(logprob), int(token.removeprefix("token_id:"))) for token, logprob in entry.items())
    )
    if len(ranked) < k:
        raise ValueError
    return [(token, -negative) for negative, token in ranked[:k]]


def covered_probability(logprobs: Tensor) -> float:
    """Mean share of the probability that the top-k entries hold, (n, k) log-probabilities."""
    return float(logprobs.double().exp().sum(dim=-1).mean()) if logprobs.numel() else math.nan
