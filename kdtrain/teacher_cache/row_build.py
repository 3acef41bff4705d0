"""Fill a teacher cache and check one: what costs time and disk, and is said beforehand."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdtrain.console import progress, say
from kdtrain.data.tokens import token_budget_batches
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, write_json, writing
from kdtrain.models.loading import sentence_states, sequence_states, shape_of
from kdtrain.models.teachers import Teacher
from kdtrain.tasks.classification.pairs import PairRows, Rows, tokenize_split
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.teacher_cache.row_cache import Identity, TeacherCache, open_cache
from kdtrain.teacher_cache.shards import (
    MANIFEST,
    check_agreement,
    check_room,
    stored_sample,
    verify_checksums,
    write_shard,
)

SHARD_ROWS = 2048
SHARD_BYTES = 256e6


@dataclass(frozen=True)
class Outputs:
    """What the teacher says of some rows, on the host."""

    logits: Tensor
    """(B, C) float32"""
    states: Tensor | None = None
    """(B, P, L, D) float32, or (tokens, L, D) with `lengths`"""
    lengths: Tensor | None = None
    """(B, P) int64"""

    def bytes(self, dtype: str) -> int:
        """What they take on disk."""
        states = 0 if self.states is None else self.states.numel() * getattr(torch, dtype).itemsize
        return 4 * self.logits.numel() + states


def build_cache(
    folder: Path,
    teacher: Teacher,
    identity: Identity,
    rows: TextRows,
    *,
    batch_tokens: int,
    device: torch.device,
) -> TeacherCache:
    """Open the cache and compute the rows it lacks.

    Raises:
        KdtrainError: another teacher's cache, too little room on the disk, or another run that is writing there now.
    """
    cache, todo = _what_is_missing(folder, identity, rows)
    if cache is not None and not todo:
        return cache
    with writing(folder, "the teacher cache", "teacher.cache"):
        cache, todo = _what_is_missing(folder, identity, rows)  # again: another run may have just finished
        if cache is None:
            write_json(folder / MANIFEST, {**identity.manifest(), "teacher": teacher.path, "rows": 0})
            cache = TeacherCache(folder, identity.layers, identity.sequences)
        lacking = rows.select(list(todo.values()))
        tokens = tokenize_split(
            lacking, teacher.tokenizer, teacher.max_length, identity.focus, teacher.insert
        )
        _state_the_cost(cache, teacher, identity, tokens)
        _compute(cache, teacher, identity.dtype, list(todo), tokens, batch_tokens, device)
        manifest = {**identity.manifest(), "layers": list(cache.layers), "sequences": cache.sequences}
        write_json(folder / MANIFEST, {**manifest, "teacher": teacher.path, "rows": len(cache)})
    return cache


def _what_is_missing(
    folder: Path, identity: Identity, rows: TextRows
) -> tuple[TeacherCache | None, dict[str, int]]:
    cache = open_cache(folder, identity)
    known = {} if cache is None else cache.places
    return cache, {key: i for i, key in enumerate(rows.keys()) if key not in known}


def _state_the_cost(cache: TeacherCache, teacher: Teacher, identity: Identity, tokens: Rows) -> None:
    count, parts = len(tokens), 2 if isinstance(tokens, PairRows) else 1
    width, layers = shape_of(teacher.model.config).width, len(cache.layers)
    size = getattr(torch, identity.dtype).itemsize
    need = count * (16 + 4 * identity.classes)
    text = f"{count} rows x ({identity.classes} logits"
    if layers and cache.sequences:
        lengths = tokens.texts.lengths[tokens.index] if isinstance(tokens, PairRows) else tokens.lengths
        need += int(lengths.sum()) * layers * width * size
        text += f") + {int(lengths.sum())} tokens x ({layers} x {width} features in {identity.dtype}"
    elif layers:
        need += count * parts * layers * width * size
        text += f" + {parts * layers} x {width} features in {identity.dtype}"
    say(f"teacher cache: {text}) = {human_bytes(need)} in {cache.folder}")
    check_room(cache.folder, need, "store fewer teacher.layers")


def _compute(
    cache: TeacherCache,
    teacher: Teacher,
    dtype: str,
    keys: list[str],
    tokens: Rows,
    batch_tokens: int,
    device: torch.device,
) -> None:
    nn.Module.to(teacher.model, device)
    waiting: list[tuple[list[str], Outputs]] = []
    with progress(len(keys), "teacher", unit="rows") as bar:
        batches = token_budget_batches(tokens.lengths, batch_tokens)
        for number, index in enumerate(batches):
            outputs = teacher_outputs(teacher, tokens, index, cache.layers, device, sequences=cache.sequences)
            waiting.append(([keys[i] for i in index.tolist()], outputs))
            full = sum(len(part[0]) for part in waiting) >= SHARD_ROWS
            full |= sum(part[1].bytes(dtype) for part in waiting) >= SHARD_BYTES
            if full or number == len(batches) - 1:
                cache.add(_write_shard(cache.folder, waiting, dtype))
                waiting = []
            bar.update(len(index))


@torch.inference_mode()
def teacher_outputs(
    teacher: Teacher,
    rows: Rows,
    index: Tensor,
    layers: tuple[int, ...],
    device: torch.device,
    *,
    sequences: bool = False,
) -> Outputs:
    """Ask the teacher about the given rows: class logits and, with `layers`, states of first tokens or of all.

    Of all: but those of inserted tokens, which the student has not.
    """
    input_ids, mask = rows.batch(index)
    output = teacher.model(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), output_hidden_states=bool(layers)
    )
    logits = teacher.class_logits(output.logits.float()).cpu()
    if not bool(logits.isfinite().all()):
        raise KdtrainError(
            f"the teacher {teacher.path} gives logits that are not finite; its weights are damaged"
        )
    if not layers:
        return Outputs(logits)
    if not sequences:
        states = sentence_states(output, layers).float().cpu()
        return Outputs(logits, states.unflatten(0, (len(index), -1)))
    kept = mask.flatten(0, -2).bool()
    # Inserted tokens would shift all others against the student's.
    kept[:, 1 : 1 + len(teacher.insert)] = False
    states = sequence_states(output, layers).transpose(1, 2)[kept.to(device)].float().cpu()
    return Outputs(logits, states, kept.sum(dim=-1).reshape(len(index), -1))


def verify_cache(
    cache: TeacherCache,
    teacher: Teacher,
    identity: Identity,
    rows: TextRows,
    *,
    count: int,
    seed: int,
    device: torch.device,
) -> int:
    """Check the checksum of every shard and recompute `count` random rows; give the number of rows recomputed.

    Raises:
        KdtrainError: a shard whose bytes changed, or a row that the teacher now answers otherwise.
    """
    verify_checksums(cache.folder)
    keys = rows.keys()
    chosen = stored_sample(cache.places, keys, count, seed)
    tokens = tokenize_split(
        rows.select(chosen), teacher.tokenizer, teacher.max_length, identity.focus, teacher.insert
    )
    stored_rows = cache.rows([keys[i] for i in chosen], cache.layers)
    nn.Module.to(teacher.model, device)
    for row in range(len(chosen)):
        index = torch.tensor([row])
        now = teacher_outputs(teacher, tokens, index, cache.layers, device, sequences=cache.sequences)
        pairs = [("logits", stored_rows.logits[index], now.logits, 1e-3)]
        if now.states is not None and now.lengths is not None:
            padded, mask = stored_rows.sequences(index)
            pairs.append(("states", padded.transpose(1, 2)[mask], now.states, 1e-2))
        elif now.states is not None:
            pairs.append(("states", stored_rows.states(index), now.states.flatten(0, 1), 1e-2))
        for name, stored_values, values, tolerance in pairs:
            check_agreement(cache.folder, keys[chosen[row]], name, stored_values, values, tolerance)
    return len(chosen)


def _write_shard(folder: Path, parts: list[tuple[list[str], Outputs]], dtype: str) -> Path:
    shard = {"logits": torch.cat([outputs.logits for _, outputs in parts])}
    states = [outputs.states for _, outputs in parts if outputs.states is not None]
    lengths = [outputs.lengths for _, outputs in parts if outputs.lengths is not None]
    if lengths:
        shard["lengths"] = torch.cat(lengths)
    if states:
        shard["states"] = torch.cat(states).to(getattr(torch, dtype))
        if not bool(shard["states"].isfinite().all()):
            raise KdtrainError("a teacher feature is too large for float16; set teacher.dtype to float32")
    return write_shard(folder, [key for part in parts for key in part[0]], shard)
