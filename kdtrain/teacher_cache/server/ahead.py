"""Answers that are asked for before they are needed: in a known order, several at a time, and never more than fit in a bound."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, Self, TypeVar

Answer = TypeVar("Answer")


class Piece(NamedTuple):
    """A piece of text that will be needed."""

    key: Hashable
    ids: Sequence[int]


class Ahead(Generic[Answer]):
    """Asks for the pieces that come, ahead of the reader.

    Args:
        ask: the answer to a piece; called from several threads.
        workers: pieces that are asked at a time.
        tokens: how many tokens are at most asked or answered and not read yet; one piece may be longer.
    """

    def __init__(self, ask: Callable[[Sequence[int]], Answer], *, workers: int, tokens: int) -> None:
        self.ask, self.tokens = ask, tokens
        self.waited = 0.0
        """seconds that the reader has waited"""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="teacher-server")
        self._coming: Iterator[Piece] = iter(())
        self._next: Piece | None = None
        self._asked: deque[tuple[Piece, Future[Answer]]] = deque()
        self._outstanding = 0
        self._lock = threading.Lock()

    def expect(self, pieces: Iterable[Piece]) -> None:
        """These pieces are needed next, in this order; what was expected before is not."""
        with self._lock:
            for piece, _ in list(self._asked):
                self._drop(piece.key)
            self._coming, self._next = iter(pieces), None
            self._fill()

    def take(self, piece: Piece) -> Answer:
        """The answer to a piece, asked for now where it was not expected."""
        with self._lock:
            future = next((future for one, future in self._asked if one.key == piece.key), None)
        began = time.monotonic()
        try:
            return self.ask(piece.ids) if future is None else future.result()
        finally:
            self.waited += time.monotonic() - began
            with self._lock:
                self._drop(piece.key)
                self._fill()

    def forget(self, over: Callable[[Hashable], bool]) -> None:
        """Drop the pieces whose key this is true for: nobody will read them."""
        with self._lock:
            for piece, _ in list(self._asked):
                if over(piece.key):
                    self._drop(piece.key)
            self._fill()

    def _drop(self, key: Hashable) -> None:
        for place, (piece, future) in enumerate(self._asked):
            if piece.key == key:
                future.cancel()
                self._outstanding -= len(piece.ids)
                del self._asked[place]
                return

    def _fill(self) -> None:
        while True:
            self._next = self._next or next(self._coming, None)
            if self._next is None or (self._asked and self._outstanding + len(self._next.ids) > self.tokens):
                return
            self._asked.append((self._next, self._pool.submit(self.ask, self._next.ids)))
            self._outstanding += len(self._next.ids)
            self._next = None

    def close(self) -> None:
        """Ask for nothing more; requests on their way are waited for."""
        with self._lock:
            self._coming, self._next = iter(()), None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
