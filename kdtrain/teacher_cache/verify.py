"""Check a teacher store: every byte against its checksum, and random rows against what the teacher computes now."""

import random
from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.teacher_cache.build import Prepare, Work, share
from kdtrain.teacher_cache.shard import Keys, Ragged
from kdtrain.teacher_cache.store import Store, StoreSpec

ROUNDINGS = 2**8
"""Of one value after the other in a deep model: 64 layers of four matmuls. Independent errors grow with the root."""
SUMMANDS = 2**12
"""Of a matmul, which is summed in float32 in an order that depends on the batch and the machine."""
UNIT = {
    "fp32": 2.0**-24,
    "bf16": 2.0**-8,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "int32": 0.0,
}
"""Largest relative error of one rounding."""


def tolerance(spec: StoreSpec, name: str) -> float:
    """How far a stored value may be from one that is computed now, in units of 1 + the root mean square of its element."""
    computed = UNIT[spec.precision] * ROUNDINGS**0.5 + UNIT["fp32"] * (ROUNDINGS * SUMMANDS) ** 0.5
    return UNIT[spec.tensors[name].dtype] + computed


def verify(
    store: Store, keys: Keys, prepare: Prepare, accelerator: Accelerator, *, count: int, seed: int
) -> int:
    """Compare all rows with their checksums, and all tensors of `count` random ones with what the teacher computes now.

    All processes share the work.

    Args:
        keys: of the rows that `prepare` knows.
        count: how many of them to recompute, all when they are fewer.

    Returns:
        The number of rows that were computed again.

    Raises:
        KdtrainError: a row whose bytes have changed, or that the teacher computes otherwise now.
    """
    for shard in share(store.shards, accelerator):
        for name in shard.tensors:
            for row in range(len(shard.keys)):
                shard.read(row, name)
    chosen = _sample(store, keys, count, seed)
    if chosen:
        with closing(prepare(np.array(chosen))) as work:
            work.expect([torch.arange(len(chosen))[accelerator.process_index :: accelerator.num_processes]])
            for number in share(range(len(chosen)), accelerator):
                _recompute(store, keys[chosen[number]], work, number)
    return len(chosen)


def spot_check(store: Store, keys: Keys, prepare: Prepare, *, count: int) -> None:
    """Compare a few stored rows with what the teacher computes now, before others are stored beside them.

    Raises:
        KdtrainError: the teacher computes something else now.
    """
    chosen = _sample(store, keys, count, seed=0)
    if chosen:
        with closing(prepare(np.array(chosen))) as work:
            for number in range(len(chosen)):
                _recompute(store, keys[chosen[number]], work, number)


def _sample(store: Store, keys: Keys, count: int, seed: int) -> list[int]:
    """Numbers of some rows of which something is stored, ascending."""
    held = [store.find(name, keys)[2] for name in store.spec.tensors]
    stored = np.flatnonzero(np.any(held, axis=0)).tolist()
    return sorted(random.Random(seed).sample(stored, min(count, len(stored))))


def _recompute(store: Store, key: bytes, work: Work, number: int) -> None:
    """Compare what is stored of one row with what the teacher computes of row `number` of the work."""
    keys = np.array([key], "S16")
    names = [name for name in store.spec.tensors if store.find(name, keys)[2].all()]
    _compare(store, keys.tobytes().hex(), store.rows(keys, names).batch([0]), work, torch.tensor([number]))


def _compare(store: Store, key: str, found: dict[str, Ragged], work: Work, row: Tensor) -> None:
    place = f"row {key} of {store.folder}"
    now = work.compute(row, list(found))
    for name, stored in found.items():
        ours, theirs = stored.values, now[name].values
        if ours.shape != theirs.shape or not torch.equal(stored.lengths, now[name].lengths):
            raise KdtrainError(
                f"{place}: the stored {name} have the shape {tuple(ours.shape)}, the recomputed ones {tuple(theirs.shape)}; delete the "
                "folder and build it again"
            )
        if name == "indices":
            if bool((ours.sort(-1).values.diff(dim=-1) == 0).any()):
                raise KdtrainError(
                    f"{place}: the stored indices name a token twice; delete the folder and build it again"
                )
        elif name == "logprobs":
            # Two tokens that are almost equally likely may change places: each stored id has to have its own
            # log-probability, and together they have to be the most likely ones.
            at = work.compute(row, ["logprobs"], found["indices"].values)["logprobs"].values
            bound = tolerance(store.spec, name)
            _agree(place, "log-probabilities of the stored indices", ours, at, bound)
            _agree(place, name, ours.sort(-1).values, theirs.sort(-1).values, bound)
        else:
            _agree(place, name, ours, theirs, tolerance(store.spec, name))


def _agree(place: str, name: str, stored: Tensor, now: Tensor, bound: float) -> None:
    """Compare element by element, each by the root mean square over its values."""
    stored, now = (tensor.double().reshape(len(tensor), -1) for tensor in (stored, now))
    error, size = ((tensor.square().mean(-1)).sqrt() for tensor in (stored - now, now))
    if not bool((error <= bound * (1 + size)).all()):
        worst = float((stored - now).abs().max())
        raise KdtrainError(
            f"{place}: the stored {name} differ from the recomputed ones by {worst:.3g}; delete the folder and build it again"
        )
