"""Before anything is asked for real: do these servers answer what a recipe needs? What is wrong is an error with the flag."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.teacher_cache.server.answers import covered_probability
from kdtrain.teacher_cache.server.connection import POOLING
from kdtrain.teacher_cache.server.servers import TeacherServers

FULL = {"fp32": "float32", "bf16": "bfloat16"}
"""`teacher.precision` in the words of `--dtype`."""
AGREES = {"fp32": 0.01, "bf16": 0.2}
"""Nats by which log-probabilities of a server and of hidden states with the head may differ on average."""
PROBED = 8
"""Entries of each distribution that are compared."""


def check_hidden(
    servers: TeacherServers,
    head: Callable[[Tensor], Tensor],
    width: int,
    probe: Sequence[int],
    longest: Sequence[int],
    precision: str,
) -> list[str]:
    """Refuse servers whose hidden states are not what enters the head.

    Args:
        head: log-probabilities (n, V) of states (n, D).
        width: D of the head.
        probe: token ids of a short text.
        longest: token ids of as many tokens as a row may have.
        precision: in which the teacher is said to compute (teacher.precision).

    Returns:
        What was found, for people.

    Raises:
        KdtrainError: a server answers something else; names the URL and the flag or field that mends it.
    """
    if not servers.pooling:
        raise KdtrainError(
            f"{servers.urls[0]} has no /pooling: it was started to generate text; start it with {POOLING} (kdtrain serve-command "
            "prints the command), or store top-k entries"
        )
    for url in servers.pooling:
        one = servers.only(url)
        states = one.states(probe, "float32")
        if states.shape[1] != width:
            raise KdtrainError(
                f"{url} answers states of width {states.shape[1]}, the head at teacher.path is {width} wide; name in teacher.path what "
                "the server serves"
            )
        norms = states.norm(dim=-1)
        if bool(((norms - 1).abs() < 1e-2).all()):
            raise KdtrainError(f"{url} normalises its states; start it with {POOLING}")
        check_dtype(url, states, precision)
        half = len(probe) // 2
        first = one.states(probe[:half], "float32")
        if not torch.allclose(first, states[:half], rtol=0.05, atol=0.05 * float(states.abs().max())):
            raise KdtrainError(
                f"{url} answers other states for the first tokens of a text when more follow, so it is not a causal model; start it with "
                f"{POOLING} and without --hf-overrides"
            )
        one.states(longest, "bfloat16")  # refuses truncation, chunks and a length that is too small
    for url in servers.generating:
        logprobs, ids = servers.only(url).likeliest(probe, PROBED)
        ours = head(servers.states(probe, "float32")).gather(-1, ids)
        error = float((ours - logprobs).abs().mean())
        if not error <= AGREES[precision]:
            raise KdtrainError(
                f"the head at teacher.path makes other log-probabilities of the states of {servers.pooling[0]} than {url} answers (on average "
                f"{error:.3g} nats apart); name in teacher.path what both servers serve, with --dtype {FULL[precision]}"
            )
    compared = (
        f"log-probabilities of {len(probe)} tokens equal those of {servers.generating[0]}"
        if servers.generating
        else "a second server in teacher.url that generates text would let log-probabilities be compared"
    )
    return [
        f"{', '.join(servers.pooling)}: hidden states of {servers.model.name} ({servers.model.root}), width {width}, {FULL[precision]}, up to "
        f"{servers.model.max_length} tokens; {compared}"
    ]


def check_dtype(url: str, states: Tensor, precision: str) -> None:
    """Refuse states that were computed in another precision than the recipe says: half precision shows in the values."""
    found = next(
        (
            name
            for name in ("bfloat16", "float16")
            if torch.equal(states.to(getattr(torch, name)).float(), states)
        ),
        "float32",
    )
    if found != FULL[precision]:
        fields = {"bfloat16": "bf16", "float32": "fp32"}
        other = f", or set teacher.precision: {fields[found]}" if found in fields else ""
        raise KdtrainError(
            f"{url} computes in {found}, but teacher.precision is {precision}; start it with --dtype {FULL[precision]}{other}"
        )


def check_top_k(servers: TeacherServers, probe: Sequence[int], longest: Sequence[int], k: int) -> list[str]:
    """The same for servers that answer log-probabilities.

    Args:
        probe: token ids of a short text.
        longest: token ids of as many tokens as a row may have.
        k: entries of each distribution (teacher.top_k).
    """
    if not servers.generating:
        raise KdtrainError(
            f"{servers.urls[0]} generates no text, so it answers no log-probabilities; start it without --runner pooling (kdtrain "
            "serve-command prints the command), or set teacher.signal: hidden"
        )
    logprobs = torch.empty(0, k)
    for url in servers.generating:
        one = servers.only(url)
        whole, _ = one.likeliest(probe, k)
        shorter, _ = one.likeliest(probe[:-1], k)
        if not torch.allclose(shorter[-1], whole[-2], atol=0.3, rtol=0.05):
            raise KdtrainError(
                f"{url} answers other log-probabilities for what it generates than for a prompt; start it with --logprobs-mode raw_logprobs "
                "and --generation-config vllm"
            )
        logprobs, _ = one.likeliest(longest, k)
    covered = covered_probability(logprobs)
    return [
        f"{', '.join(servers.generating)}: the {k} most likely tokens of {servers.model.name} ({servers.model.root}), which hold {covered:.1%} of "
        f"the probability of a sample, up to {servers.model.max_length - 1} tokens"
    ]
