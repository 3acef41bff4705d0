"""Fill a teacher store: all processes together, after the cost has been stated, and again from where a killed build stopped."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from kdtrain.console import progress, say
from kdtrain.data.tokens import token_budget_batches
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, writing
from kdtrain.teacher_cache.shard import Keys, Ragged
from kdtrain.teacher_cache.store import Store, StoreSpec

SHARD_ROWS = 2048
SHARD_BYTES = 256e6
SHARD_SECONDS = 60.0
"""A file is written as soon as one of the three is reached: what a killed process had not written yet is lost."""

Item = TypeVar("Item")


class Work:
    """A teacher and the rows that it has to compute; every task has a subclass, which implements the first three."""

    @property
    def costs(self) -> Tensor:
        """(R,) int64: tokens of each row in a forward pass."""
        raise NotImplementedError

    def elements(self, name: str) -> Tensor:
        """(R,) int64: elements of each row in tensor `name`."""
        raise NotImplementedError

    def compute(self, rows: Tensor, names: Sequence[str], indices: Tensor | None = None) -> dict[str, Ragged]:
        """These tensors of these rows, on the host.

        Args:
            rows: row numbers.
            names: what to compute.
            indices: (elements, K) ids whose `logprobs` are asked for, in place of the K most likely ones.
        """
        raise NotImplementedError

    def expect(self, batches: Sequence[Tensor]) -> None:
        """Told the row numbers of the calls of `compute` that follow, so that a teacher elsewhere is asked ahead."""

    def note(self) -> str:
        """Remark for the progress bar."""
        return ""

    def close(self) -> None:
        """Let go of what the work holds open."""


Prepare = Callable[[np.ndarray], Work]
"""Make the work of these row numbers, for example tokenize them."""


def build(store: Store, keys: Keys, prepare: Prepare, accelerator: Accelerator, *, batch_tokens: int) -> int:
    """Compute what the store lacks of these rows; called by all processes with the same arguments.

    Every process computes its share and writes its own files, while the first one holds the lock of the folder. The
    processes meet after every batch, so none waits for another for longer than a batch takes.

    Args:
        keys: of every row.
        prepare: called with the numbers of the missing rows.
        batch_tokens: tokens in one forward pass.

    Returns:
        The number of rows that all processes computed.

    Raises:
        KdtrainError: too little room on the disk, another run that writes there now, or outputs that are not finite.
    """
    with ExitStack() as stack:
        plan: list[tuple[tuple[str, ...], np.ndarray]] | str | None = None
        work: Work | None = None
        if accelerator.is_main_process:
            try:
                plan = store.missing(keys)
                if plan:
                    stack.enter_context(writing(store.folder, "the teacher cache", "teacher.cache"))
                    store.refresh()  # another run may have just finished
                    plan = store.missing(keys)
            except KdtrainError as error:
                plan = str(error)
        plan = agreed(plan, accelerator)
        if isinstance(plan, str):
            raise KdtrainError(plan)
        if plan:
            numbers = np.unique(np.concatenate([rows for _, rows in plan]))
            groups = [(names, torch.from_numpy(np.searchsorted(numbers, rows))) for names, rows in plan]
            work = prepare(numbers)
            stack.callback(work.close)
            _check_room(store, work, groups, accelerator)
            _compute(store, keys[numbers], work, groups, accelerator, batch_tokens)
    store.refresh()
    if work is not None and store.missing(keys):
        raise KdtrainError(
            f"process {accelerator.process_index} does not see in {store.folder} what the other processes wrote; set teacher.cache to "
            "a folder on a file system that all processes share"
        )
    return sum(len(rows) for _, rows in plan or ())


def agreed(value: Item, accelerator: Accelerator) -> Item:
    """The first process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def share(items: Sequence[Item], accelerator: Accelerator) -> Iterator[Item]:
    """This process's part of `items`, in step with the other processes: none gets ahead by more than one item."""
    count = accelerator.num_processes
    for first in range(0, len(items), count):
        if first + accelerator.process_index < len(items):
            yield items[first + accelerator.process_index]
        accelerator.wait_for_everyone()


def _check_room(
    store: Store, work: Work, groups: Sequence[tuple[Sequence[str], Tensor]], accelerator: Accelerator
) -> None:
    """State what the new files will take, and refuse to fill the disk; write the manifest."""
    problem = None
    if accelerator.is_main_process:
        rows = torch.cat([rows for _, rows in groups]).unique().numel()
        parts: dict[tuple[int, str], list[str]] = {}
        need = 24 * rows
        for name, element in store.spec.tensors.items():
            count = sum(int(work.elements(name)[rows].sum()) for names, rows in groups if name in names)
            if count:
                shape = " x ".join(str(size) for size in (count, *element.shape))
                parts.setdefault((count, f"{shape} {element.dtype}"), []).append(name)
                need += count * element.bytes + 8 * rows
        words = "; ".join(f"{', '.join(names)}: {size}" for (_, size), names in parts.items())
        say(f"teacher cache: {rows} rows ({words}), {human_bytes(need)} in {store.folder}")
        free = shutil.disk_usage(store.folder).free
        if need > free:
            problem = (
                f"the teacher cache needs {human_bytes(need)} in {store.folder}, which has {human_bytes(free)} free; set teacher.cache "
                "to another folder, or store less (teacher.layers, teacher.dtype, teacher.top_k)"
            )
        else:
            store.write_manifest()
    problem = agreed(problem, accelerator)
    if problem is not None:
        raise KdtrainError(problem)


def _compute(
    store: Store,
    keys: Keys,
    work: Work,
    groups: Sequence[tuple[Sequence[str], Tensor]],
    accelerator: Accelerator,
    batch_tokens: int,
) -> None:
    batches = [
        (names, rows[batch])
        for names, rows in groups
        for batch in token_budget_batches(work.costs[rows], batch_tokens)
    ]
    total = sum(int(work.costs[rows].sum()) for _, rows in groups)
    count = accelerator.num_processes
    work.expect([rows for _, rows in batches[accelerator.process_index :: count]])
    waiting = Waiting(store, keys)
    with progress(total, "teacher", unit="tokens", show=accelerator.is_main_process) as bar:
        try:
            for number, (names, rows) in enumerate(share(batches, accelerator)):
                waiting.add(names, rows, work.compute(rows, names))
                together = batches[number * count : (number + 1) * count]
                bar.note(work.note())
                bar.update(sum(int(work.costs[rows].sum()) for _, rows in together))
        finally:
            waiting.write()  # what was computed before a failure is kept
        accelerator.wait_for_everyone()


class Waiting:
    """What one process has computed and not written yet."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.store, self.keys = store, keys
        self.names: Sequence[str] = ()
        self.rows: list[Tensor] = []
        self.outputs: list[dict[str, Ragged]] = []
        self.bytes, self.started = 0, 0.0

    def add(self, names: Sequence[str], rows: Tensor, outputs: dict[str, Ragged]) -> None:
        """Some more rows; enough of them are written."""
        if tuple(names) != tuple(self.names):
            self.write()
            self.names = names
        if not self.rows:
            self.started = time.monotonic()
        stored = {name: stored_as(self.store.spec, name, outputs[name]) for name in names}
        self.rows.append(rows)
        self.outputs.append(stored)
        self.bytes += sum(ragged.values.nbytes for ragged in stored.values())
        full = sum(len(one) for one in self.rows) >= SHARD_ROWS or self.bytes >= SHARD_BYTES
        if full or time.monotonic() - self.started >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Write all of it."""
        if self.rows:
            merged = {
                name: Ragged(
                    *(torch.cat(parts) for parts in zip(*(one[name] for one in self.outputs), strict=True))
                )
                for name in self.names
            }
            self.store.write(self.keys[torch.cat(self.rows).numpy()], merged)
        self.rows, self.outputs, self.bytes = [], [], 0


def stored_as(spec: StoreSpec, name: str, outputs: Ragged) -> Ragged:
    """Outputs in the dtype in which they are stored.

    Raises:
        KdtrainError: NaN or infinite values.
    """
    element, values = spec.tensors[name], outputs.values
    if tuple(values.shape[1:]) != element.shape:
        raise ValueError(f"{name} has elements of {tuple(values.shape[1:])}, not {element.shape}")
    left_out = values.isneginf() if name == "logprobs" else torch.zeros((), dtype=torch.bool)
    if not bool((values.isfinite() | left_out).all()):
        raise KdtrainError(
            f"the teacher {spec.teacher} computed {name} that are NaN or infinite; check its weights, precision and attention mask"
        )
    stored = values.to(getattr(torch, element.dtype))
    if not bool((stored.isfinite() | left_out).all()):
        raise KdtrainError(
            f"{name} of the teacher {spec.teacher} reach {float(values.abs().max()):.3g}, too large for {element.dtype}; set "
            "teacher.dtype: float32"
        )
    return Ragged(stored, outputs.lengths)
