"""Kept tokens of a teacher in Arrow files, as `datasets` writes them: a row is a document (docs/code-lm.md).

input_ids          list of N int32 or int64
teacher_logprobs   list of N lists of K float32 or float16
teacher_token_ids  list of N lists of K int32 or int64

Nothing is copied: the tensors are the memory-mapped file.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from kdtrain.errors import KdtrainError

DEPTHS = {"input_ids": 1, "teacher_logprobs": 2, "teacher_token_ids": 2}
"""lists within lists"""
MAGIC = b"ARROW1"


def map_arrow(path: Path, remedy: str) -> Iterator[dict[str, Tensor]]:
    """Each record batch of a file, stream or random access, as the tensors that a safetensors shard holds.

    Columns that the file lacks are missing from them, others are left out.

    Args:
        remedy: ends the sentence that refuses a damaged file.

    Raises:
        KdtrainError: a damaged file, columns that hold something else, rows whose parts have different lengths.
    """
    try:
        source = pa.memory_map(str(path))
        random_access = source.read(len(MAGIC)) == MAGIC
        source.seek(0)
        if random_access:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        else:
            batches = list(pa.ipc.open_stream(source))
    except (OSError, pa.ArrowException) as error:
        raise KdtrainError(f"{path} is damaged ({error}); {remedy}") from None
    for batch in batches:
        if batch.num_rows:
            yield tensors_of(path, batch)


def tensors_of(path: Path, batch: pa.RecordBatch) -> dict[str, Tensor]:
    """The documents of one record batch, end to end."""
    found: dict[str, Tensor] = {}
    for name in (name for name in DEPTHS if name in batch.schema.names):
        values, sizes = flat(path, name, batch.column(name))
        lengths = torch.from_dlpack(sizes[0].cast(pa.int64()))
        if not torch.equal(found.setdefault("lengths", lengths), lengths):
            raise KdtrainError(f"{path}: the lists of a row must have as many entries as it has tokens")
        tensor = torch.from_dlpack(values)
        if len(sizes) == 2:
            kept = torch.from_dlpack(sizes[1].cast(pa.int64()))
            if len(kept) and int(kept.min()) != int(kept.max()):
                raise KdtrainError(
                    f"{path}: {name} must hold equally many entries for every token, got {int(kept.min())} to {int(kept.max())}"
                )
            tensor = tensor.view(len(kept), -1)
        found[name] = tensor
    return found


def flat(path: Path, name: str, column: pa.Array) -> tuple[pa.Array, list[pa.Array]]:
    """The numbers of a column of lists end to end, and the lengths of the lists at each depth."""
    kind, depth, sizes = column.type, DEPTHS[name], []
    values: pa.Array = column
    for _ in range(depth):
        if hasattr(values, "value_lengths") and not values.null_count:
            sizes.append(values.value_lengths())
            values = values.flatten()
    number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    if len(sizes) != depth or values.null_count or not number:
        words = "lists of numbers" if depth == 1 else "lists of lists of numbers"
        raise KdtrainError(f"{path}: {name} must be {words} without nulls, got {kind}")
    return values, sizes
