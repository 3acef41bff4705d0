"""Near-duplicate texts: MinHash over token shingles finds candidates, exact Jaccard similarity decides."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

_TOKEN = re.compile(r"\w+|[^\w\s]")
_SHINGLE = 5  # tokens
SIMILARITY = 0.7
# Made for it: a pair of similarity 0.7 shares a band with probability 0.9999, one of 0.2 with 0.17.
_BANDS, _ROWS = 24, 3
_PRIME = (1 << 31) - 1


def shingles(text: str) -> np.ndarray:
    """Sorted unique hashes of every run of five tokens (white space and line breaks do not count)."""
    tokens = np.array([zlib.crc32(token.encode()) for token in _TOKEN.findall(text)], dtype=np.uint64)
    if len(tokens) < _SHINGLE:
        return np.unique(tokens % _PRIME)
    hashes = np.zeros(len(tokens) - _SHINGLE + 1, dtype=np.uint64)
    for offset in range(_SHINGLE):
        hashes = (hashes * np.uint64(1_000_003) + tokens[offset : offset + len(hashes)]) % np.uint64(_PRIME)
    return np.unique(hashes)


def clusters(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first text of its cluster.

    Two texts belong together when the Jaccard similarity of their shingle sets is at least SIMILARITY, directly
    or through others. Deterministic: the hash functions are fixed.
    """
    sets = [shingles(text) for text in texts]
    generator = np.random.default_rng(0)
    factor = generator.integers(1, _PRIME, size=(_BANDS * _ROWS, 1), dtype=np.uint64)
    offset = generator.integers(0, _PRIME, size=(_BANDS * _ROWS, 1), dtype=np.uint64)
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    seen: dict[tuple[int, bytes], list[int]] = {}
    for index, members in enumerate(sets):
        if not len(members):
            continue
        signature = ((factor * members + offset) % np.uint64(_PRIME)).min(axis=1).reshape(_BANDS, _ROWS)
        for band in range(_BANDS):
            # A bucket keeps one text of each cluster it has met, so common idioms do not make it grow.
            bucket = seen.setdefault((band, signature[band].tobytes()), [])
            for other in bucket:
                if root(other) == root(index):
                    break
                if _jaccard(members, sets[other]) >= SIMILARITY:
                    low, high = sorted((root(other), root(index)))
                    parent[high] = low
                    break
            else:
                bucket.append(index)
    return [root(index) for index in range(len(texts))]


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    if min(len(first), len(second)) < 0.5 * max(len(first), len(second)):
        return 0.0
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
