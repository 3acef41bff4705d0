"""Fill a language teacher's cache and check one: what costs time and disk, and is said beforehand."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdkernels import teacher_cross_term
from kdtrain.console import progress, say
from kdtrain.data.tokens import token_budget_batches
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, write_json, writing
from kdtrain.models.heads import Head
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.teacher_cache.shards import (
    MANIFEST,
    check_agreement,
    check_room,
    stored_sample,
    verify_checksums,
    write_shard,
)
from kdtrain.teacher_cache.token_cache import TENSORS, LanguageCache, Signal, open_language_cache, row_keys

SHARD_TOKENS = 1 << 18
CHUNK_TOKENS = 512


def build_language_cache(
    folder: Path,
    teacher: LanguageTeacher,
    signal: Signal,
    rows: PackedRows,
    *,
    batch_tokens: int,
    device: torch.device,
) -> LanguageCache:
    """Open the cache and compute the rows it lacks; the cost is said before anything is computed.

    Raises:
        KdtrainError: another teacher's cache, too little room on the disk, or another run that is writing there now.
    """
    keys = row_keys(rows)
    cache = open_language_cache(folder, signal)
    if cache is not None and not _lacking(cache, keys):
        return cache
    with writing(folder, "the teacher cache", "teacher.cache"):
        cache = open_language_cache(folder, signal)  # again: another run may have just finished
        if cache is None:
            write_json(folder / MANIFEST, {**signal.manifest(), "teacher": teacher.path})
            cache = LanguageCache(folder, signal)
        todo = _lacking(cache, keys)
        tokens = int(rows.lengths[todo].sum())
        need = tokens * signal.bytes_per_token
        say(
            f"teacher cache: {tokens} tokens x {signal.bytes_per_token} bytes ({signal.words()}) = {human_bytes(need)} in "
            f"{folder}"
        )
        check_room(folder, need, "set a smaller teacher.top_k, or teacher.signal: online")
        _compute(cache, teacher, signal, rows, keys, todo, batch_tokens, device)
        if signal.kind == "topk":
            covered = cache.covered()
            write_json(
                folder / MANIFEST,
                {**signal.manifest(), "teacher": teacher.path, "covered_probability": covered},
            )
            say(f"teacher cache: the {signal.width} kept tokens hold {covered:.2%} of the probability")
    return cache


def _lacking(cache: LanguageCache, keys: list[str]) -> list[int]:
    """Each different row that is not stored, once."""
    return [i for i in {key: i for i, key in enumerate(keys)}.values() if keys[i] not in cache.places]


def _compute(
    cache: LanguageCache,
    teacher: LanguageTeacher,
    signal: Signal,
    rows: PackedRows,
    keys: list[str],
    todo: list[int],
    batch_tokens: int,
    device: torch.device,
) -> None:
    nn.Module.to(teacher.model, device)
    waiting: list[tuple[str, dict[str, Tensor]]] = []
    stored = 0
    with progress(int(rows.lengths[todo].sum()), "teacher", unit="tokens") as bar:
        batches = token_budget_batches(rows.lengths[todo], batch_tokens)
        for number, index in enumerate(batches):
            index = torch.tensor(todo)[index]
            outputs = teacher_signal(teacher, signal, rows, index, device)
            for row, i in enumerate(index.tolist()):
                length = int(rows.lengths[i])
                waiting.append((keys[i], {name: value[row, :length] for name, value in outputs.items()}))
                stored += length
            if stored >= SHARD_TOKENS or number == len(batches) - 1:
                cache.add(_write(cache.folder, waiting))
                waiting, stored = [], 0
            bar.update(int(rows.lengths[index].sum()))


@torch.inference_mode()
def teacher_signal(
    teacher: LanguageTeacher, signal: Signal, rows: PackedRows, index: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """The stored tensors of these rows, each (B, N, ...), on the host."""
    batch = rows.batch(index, device)
    hidden, _ = teacher.hidden(batch.input_ids, batch.positions)
    if not bool(hidden.isfinite().all()):
        raise KdtrainError(
            f"the teacher {teacher.path} gives values that are not finite; its weights are damaged"
        )
    if signal.kind == "hidden":
        return {"hidden": hidden.to(getattr(torch, signal.dtype)).cpu()}
    head, shared = teacher.head, slice(signal.vocabulary)
    weight, bias = head.weight[shared], None if head.bias is None else head.bias[shared]
    if signal.frozen is not None:
        mine = signal.frozen
        found = teacher_cross_term(
            replace(teacher.with_hidden(hidden), weight=weight, bias=bias),
            mine.weight[shared].to(device),
            None if mine.bias is None else mine.bias[shared].to(device),
            temperature=mine.temperature,
        )
        return {name: getattr(found, name).cpu() for name in TENSORS[signal.kind]}
    wide = Head(weight.float(), None if bias is None else bias.float(), head.softcap, head.scale)
    flat = hidden.flatten(0, 1).float()
    kept = [wide.logits(part).log_softmax(-1).topk(signal.width, dim=-1) for part in flat.split(CHUNK_TOKENS)]
    shape = (*hidden.shape[:2], signal.width)
    return {
        "logprobs": torch.cat([part.values for part in kept]).view(shape).cpu(),
        "indices": torch.cat([part.indices for part in kept]).view(shape).int().cpu(),
    }


def verify_language_cache(
    cache: LanguageCache,
    teacher: LanguageTeacher,
    rows: PackedRows,
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
    keys = row_keys(rows)
    chosen = stored_sample(cache.places, keys, count, seed)
    nn.Module.to(teacher.model, device)
    name = TENSORS[cache.signal.kind][0]
    for i in chosen:
        now = teacher_signal(teacher, cache.signal, rows, torch.tensor([i]), device)[name][0].float()
        stored = cache.read(name, [keys[i]], len(now))[0].float()
        check_agreement(cache.folder, keys[i], name, stored, now, 2e-2)
    return len(chosen)


def _write(folder: Path, parts: list[tuple[str, dict[str, Tensor]]]) -> Path:
    names = parts[0][1]
    lengths = torch.tensor([len(next(iter(part.values()))) for _, part in parts])
    tensors = {name: torch.cat([part[name] for _, part in parts]) for name in names}
    return write_shard(folder, [key for key, _ in parts], {"lengths": lengths, **tensors})
