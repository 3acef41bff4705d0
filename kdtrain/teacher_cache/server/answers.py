"""Answers of `/pooling` and `/v1/completions` as tensors; what is not one state or distribution for each token is refused."""

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import numpy as np
import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.teacher_cache.server.connection import POOLING, Busy

WireDtype = Literal["float32", "bfloat16", "float16"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def pooling_request(model: str, ids: Sequence[int], dtype: WireDtype) -> dict[str, Any]:
    """Asks `/pooling` for the state of every token of one piece of text."""
    return {
        "model": model,
        "input": [list(ids)],
        "encoding_format": "bytes",
        "embed_dtype": dtype,
        "endianness": "little",
    }


def states_of(response: httpx.Response, url: str, ids: Sequence[int], dtype: WireDtype) -> Tensor:
    """(n, D) in `dtype`, from the answer of `/pooling`.

    Raises:
        Busy: the body is cut short.
        KdtrainError: it is not one finite state for each token.
    """
    try:
        (described,) = json.loads(response.headers["metadata"])["data"]
        count, width = (int(size) for size in described["shape"])
        start, end = int(described["start"]), int(described["end"])
    except (KeyError, TypeError, ValueError):
        raise KdtrainError(
            f"{url}/pooling answered without the shape of the states; start vLLM 0.32 or later with {POOLING}"
        ) from None
    content = response.content[start:end]
    if count != len(ids):
        raise KdtrainError(
            f"{url}/pooling answered {count} states for {len(ids)} tokens; start the server with {POOLING} and without truncation "
            "or chunked prefill (--no-enable-chunked-prefill)"
        )
    if len(content) != count * width * BYTES[dtype]:
        raise Busy(f"/pooling ended after {len(content)} of {count * width * BYTES[dtype]} bytes")
    states = torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).reshape(count, width)
    if not bool(torch.isfinite(states).all()):
        raise KdtrainError(
            f"{url}/pooling answered states that are NaN or infinite; start the server with --dtype float32 or bfloat16"
        )
    return states


def completion_request(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """Asks `/v1/completions` for the k most likely tokens after every token of one piece of text."""
    return {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
        "logprobs": k,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }


def top_k_of(answer: dict[str, Any], url: str, ids: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, k) float32 and ids (n, k) int64, most likely first, from the answer of `/v1/completions`.

    Raises:
        KdtrainError: it is not a distribution after each of these tokens.
    """
    try:
        choice = answer["choices"][0]
        # Entry i of the prompt is about token i: the distribution after token i - 1.
        rows = [_ranked(entry, k) for entry in choice["prompt_logprobs"][1:]]
        rows.append(_generated(choice["logprobs"]["top_logprobs"][0], k))
        about = choice.get("prompt_token_ids")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise KdtrainError(
            f"{url}/v1/completions answered without prompt_logprobs of {k} entries; start vLLM 0.32 or later with --max-logprobs {k}"
        ) from None
    if len(rows) != len(ids) or (about is not None and about != list(ids)):
        raise KdtrainError(
            f"{url}/v1/completions answered {len(rows)} distributions for {len(ids)} tokens, or about other tokens; name the server "
            "itself in teacher.url, nothing between that changes requests"
        )
    table = np.array(rows, dtype=np.float64)  # (n, k, 2)
    if not np.isfinite(table).all():
        raise KdtrainError(
            f"{url}/v1/completions answered log-probabilities that are NaN or infinite; start the server with --dtype float32 or bfloat16"
        )
    logprobs = table[..., 1]
    if bool((logprobs > 1e-3).any()) or bool((np.exp(logprobs).sum(-1) > 1.01).any()):
        raise KdtrainError(
            f"{url}/v1/completions answered values that are not log-probabilities; start the server with --logprobs-mode raw_logprobs"
        )
    return torch.from_numpy(logprobs.astype(np.float32)), torch.from_numpy(table[..., 0].astype(np.int64))


def _ranked(entry: dict[str, dict[str, Any]], k: int) -> list[tuple[int, float]]:
    """The k most likely of the entries of a prompt token; the token itself is one more where its rank is beyond k."""
    ranked = sorted((int(one["rank"]), int(token), float(one["logprob"])) for token, one in entry.items())
    if len(ranked) not in (k, k + 1):
        raise ValueError
    return [(token, logprob) for _, token, logprob in ranked[:k]]


def _generated(entry: dict[str, float], k: int) -> list[tuple[int, float]]:
    """The k most likely after the last token, from the one token that was generated."""
    ranked = sorted(
        ((-float(logprob), int(token.removeprefix("token_id:"))) for token, logprob in entry.items())
    )
    if len(ranked) < k:
        raise ValueError
    return [(token, -negative) for negative, token in ranked[:k]]


def covered_probability(logprobs: Tensor) -> float:
    """Mean share of the probability that the top-k entries hold, (n, k) log-probabilities."""
    return float(logprobs.double().exp().sum(dim=-1).mean()) if logprobs.numel() else math.nan
