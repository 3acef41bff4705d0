"""Requests to one or several servers: keys, retries with growing pauses, the least busy server first, and counts."""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from kdtrain.errors import KdtrainError

Answer = TypeVar("Answer")

API_KEY = "KDTRAIN_API_KEY"
"""The environment variable with the key of the server; a key is never written to a recipe, a log or a manifest."""
PATIENCE = 300.0
"""Seconds during which a failing request is sent again before the run ends."""
POOLING = """--runner pooling --pooler-config '{"task":"token_embed","use_activation":false}'"""
"""Flags of a server that answers hidden states."""


class Busy(Exception):
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


class Connection:
    """Servers at these addresses.

    Args:
        urls: addresses, such as `http://127.0.0.1:8000`.
        in_flight: requests at a time for each server; the server batches them.
        timeout: seconds that one answer may take.
        patience: seconds in place of `PATIENCE`.

    Raises:
        KdtrainError: no address, or something that is none.
    """

    def __init__(
        self, urls: Sequence[str], *, in_flight: int, timeout: float, patience: float | None
    ) -> None:
        if not urls:
            raise KdtrainError(
                "teacher.url names no server; give the address of one, such as http://127.0.0.1:8000"
            )
        self.urls = tuple(dict.fromkeys(checked_url(url) for url in urls))
        self.workers = in_flight * len(self.urls)
        self.patience = PATIENCE if patience is None else patience
        self.traffic = Traffic()
        key = os.environ.get(API_KEY)
        self.client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=10.0),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            limits=httpx.Limits(max_connections=self.workers),
            follow_redirects=False,
            trust_env=False,
        )
        self._lock = threading.Lock()
        self._waiting = dict.fromkeys(self.urls, 0)
        self._closed = threading.Event()

    def close(self) -> None:
        """Close the connections; nothing is asked again."""
        self._closed.set()
        self.client.close()

    def patiently(
        self,
        ask: Callable[[str], Answer],
        urls: Sequence[str],
        *,
        tokens: int = 0,
        patience: float | None = None,
    ) -> Answer:
        """Ask the least busy of these servers; ask again, after growing pauses, while a failure may pass.

        Args:
            ask: sends the request to a server; raises `Busy` for a failure that may pass.
            tokens: counted as answered when the answer is there.
            patience: seconds, in place of those of the connection.

        Raises:
            KdtrainError: the failure did not pass.
        """
        patience = self.patience if patience is None else patience
        ends, pause = time.monotonic() + patience, 0.25
        while True:
            with self._lock:
                url = min(urls, key=lambda one: self._waiting[one])
                self._waiting[url] += 1
            try:
                answer = ask(url)
                with self._lock:
                    self.traffic.tokens += tokens
                return answer
            except Busy as error:
                if self._closed.is_set() or time.monotonic() + pause > ends:
                    raise KdtrainError(
                        f"{url} did not answer for {patience:.0f} s: {error}; look at the server, or name another one in teacher.url; "
                        "the same command continues where it stopped"
                    ) from None
                with self._lock:
                    self.traffic.retries += 1
            finally:
                with self._lock:
                    self._waiting[url] -= 1
            self._closed.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 10.0)

    def json(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that a server answers.

        Raises:
            Busy: a failure that may pass.
            KdtrainError: the server refuses the request.
        """
        response = self.send(method, url, path, body)
        try:
            answer = response.json()
        except ValueError:
            raise Busy(f"{path} answered something that is not JSON") from None
        if not isinstance(answer, dict):
            raise KdtrainError(
                f"{url}{path} answered {type(answer).__name__} and no object; teacher.url must name a vLLM server"
            )
        return answer

    def exists(self, url: str, path: str) -> bool:
        """Whether a server serves this path; an empty request computes nothing.

        Raises:
            Busy: a failure that may pass.
            KdtrainError: the key is refused.
        """
        response = self._request("POST", url, path, {})
        if response.status_code in (401, 403):
            raise KdtrainError(refusal(url, path, response))
        return response.status_code not in (404, 405)

    def send(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """One request; failures that may pass are `Busy`, others an error that names the URL and the fix."""
        response = self._request(method, url, path, body)
        if response.status_code != 200:
            raise KdtrainError(refusal(url, path, response))
        return response

    def _request(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            response = self.client.request(method, url + path, json=body)
        except httpx.ConnectError as error:
            raise Busy(f"nothing listens there ({error})") from None
        except httpx.TimeoutException:
            raise Busy(f"{path} took longer than {self.client.timeout.read:g} s") from None
        except (
            httpx.TransportError,
            RuntimeError,
        ) as error:  # httpx raises the latter once the client is closed
            raise Busy(f"the connection broke ({error or type(error).__name__})") from None
        with self._lock:
            self.traffic.requests += 1
            self.traffic.received_bytes += len(response.content)
        if response.status_code == 429 or response.status_code >= 500:
            raise Busy(f"{path} answered {response.status_code} ({message_of(response)})")
        return response


def checked_url(url: str) -> str:
    """An address without a slash at its end."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        # What may be a password is not repeated.
        shown = repr(str(url)) if not parsed.userinfo and not parsed.query else f"one for {parsed.host}"
        raise KdtrainError(
            f"teacher.url must look like http://127.0.0.1:8000, without credentials (they belong into {API_KEY}), got {shown}"
        )
    return str(url).rstrip("/").removesuffix("/v1")


def refusal(url: str, path: str, response: httpx.Response) -> str:
    """What a refused request means, with the flag or the field that mends it."""
    message, status = message_of(response), response.status_code
    if status in (401, 403):
        return f"{url} refuses the request ({status}); set the environment variable {API_KEY} to the key of the server"
    if status in (404, 405) and path == "/pooling":
        return (
            f"{url} has no /pooling: it was started to generate text; start it with {POOLING} (kdtrain serve-command prints the "
            "command), or store top-k entries"
        )
    if status in (404, 405):
        return f"{url}{path} does not exist there ({status}: {message}); teacher.url must name a vLLM server"
    if "logprobs" in message and "max" in message:
        return f"{url} refuses teacher.top_k: {message}; start the server with a larger --max-logprobs, or lower teacher.top_k"
    if "context length" in message or "maximum model length" in message:
        return f"{url}: {message}; lower data.max_length, or start the server with a larger --max-model-len"
    return f"{url}{path} refuses the request ({status}: {message}); teacher.url must name a vLLM server 0.32 or later"


def message_of(response: httpx.Response) -> str:
    """The reason that a server gives, in one line."""
    try:
        content = response.json()
        error = content.get("error", content)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]
