"""A small network over bytes as the teacher of store tests: several kinds of tensors, on one process and on two."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from kdtrain.teacher_cache.build import Work, build
from kdtrain.teacher_cache.shard import Keys, Ragged, keys_of
from kdtrain.teacher_cache.store import Element, Store, StoreSpec

LAYERS, WIDTH, KEPT = 4, 6, 5
KINDS = {
    "logits": Element("float32", (3,)),
    **{f"states.{layer}": Element("float32", (WIDTH,)) for layer in range(LAYERS)},
    **{f"tokens.{layer}": Element("float16", (WIDTH,)) for layer in range(LAYERS)},
    "hidden": Element("bfloat16", (WIDTH,)),
    "logprobs": Element("float32", (KEPT,)),
    "indices": Element("int32", (KEPT,)),
    "entropy": Element("float32", ()),
}
TEXTS = [f"def f{i}(x):\n    return {'x + ' * (i % 9)}{i}\n" for i in range(37)]


def text_keys(texts: Sequence[str]) -> Keys:
    return keys_of([hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts])


def spec_of(*names: str, **changes: object) -> StoreSpec:
    fields: dict[str, object] = {"teacher": "bytes", "teacher_weights": "seed 0", "max_length": 64, **changes}
    return StoreSpec(tensors={name: KINDS[name] for name in names}, **fields)  # type: ignore[arg-type]


class Network(nn.Module):
    """Four layers over embedded bytes, a head over 256 of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(256, WIDTH, generator=generator)
        self.layers = torch.randn(LAYERS, WIDTH, WIDTH, generator=generator)

    def forward(self, ids: Tensor) -> list[Tensor]:
        states = [self.table[ids]]
        for weight in self.layers:
            states.append((states[-1] @ weight).tanh() + states[-1].cumsum(0) / len(ids))
        return states[1:]


@dataclass
class ToyWork(Work):
    """Texts with that network; `computed` notes how often each row was asked for."""

    texts: list[str]
    seconds: float = 0.0
    limit: int | None = None
    """rows after which the machine fails"""

    def __post_init__(self) -> None:
        self.ids = [torch.tensor(list(text.encode())) for text in self.texts]
        self.network = Network()
        self.computed: list[tuple[int, tuple[str, ...]]] = []

    @property
    def costs(self) -> Tensor:
        return torch.tensor([len(ids) for ids in self.ids])

    def elements(self, name: str) -> Tensor:
        single = name == "logits" or name.startswith("states")
        return torch.ones(len(self.ids), dtype=torch.int64) if single else self.costs

    def compute(self, rows: Tensor, names: Sequence[str], indices: Tensor | None = None) -> dict[str, Ragged]:
        time.sleep(self.seconds)
        self.computed += [(row, tuple(names)) for row in rows.tolist()]
        if self.limit is not None and len(self.computed) > self.limit:
            raise RuntimeError("the machine failed")
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for row in rows.tolist():
            states = self.network(self.ids[row])
            log_p = (states[-1] @ self.network.table.T).log_softmax(-1)
            top = log_p.topk(KEPT)
            made = {
                "logits": states[-1][:1, :3],
                **{f"states.{i}": state[:1] for i, state in enumerate(states)},
                **{f"tokens.{i}": state for i, state in enumerate(states)},
                "hidden": states[-1],
                "logprobs": top.values if indices is None else log_p.gather(-1, indices.long()),
                "indices": top.indices,
                "entropy": -(log_p.exp() * log_p).sum(-1),
            }
            for name in names:
                parts[name].append(made[name])
        return {
            name: Ragged(torch.cat(found), torch.tensor([len(part) for part in found]))
            for name, found in parts.items()
        }


def fill(
    folder: Path, spec: StoreSpec, texts: Sequence[str], accelerator: Accelerator, **options: object
) -> tuple[Store, list[ToyWork]]:
    """Build what is missing; the store, and the work that was prepared for it."""
    prepared: list[ToyWork] = []

    def prepare(numbers: np.ndarray) -> ToyWork:
        prepared.append(ToyWork([texts[i] for i in numbers.tolist()], **options))  # type: ignore[arg-type]
        return prepared[-1]

    store = Store.open(folder, spec)
    build(store, text_keys(texts), prepare, accelerator, batch_tokens=100)
    return store, prepared


def join_two(rank: int, limit: float = 60.0) -> Accelerator:
    """Accelerate in one of two processes, whose collectives fail after `limit` seconds."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    distributed_c10d._set_pg_timeout(timedelta(seconds=limit), distributed_c10d._get_default_group())
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def fill_as_one_of_two(
    rank: int, folder: str, names: Sequence[str], seconds: float = 0.0, limit: float = 60.0
) -> list[list[int]]:
    """The rows that this process computed, and what it reads of all of them afterwards."""
    accelerator = join_two(rank, limit)
    store, prepared = fill(Path(folder), spec_of(*names), TEXTS, accelerator, seconds=seconds)
    computed = [row for work in prepared for row, _ in work.computed]
    read = store.rows(text_keys(TEXTS)).batch(range(len(TEXTS)))
    return [computed, [int(ragged.lengths.sum()) for ragged in read.values()]]


def wait_for_the_other(rank: int, limit: float) -> None:
    """One process meets the other three limits later."""
    accelerator = join_two(rank, limit)
    time.sleep(3 * limit * rank)
    accelerator.wait_for_everyone()
