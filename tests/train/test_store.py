"""The teacher store by itself: ragged rows found by content, written once, checked when read, built by all processes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from kdtrain.errors import KdtrainError
from kdtrain.files import writing
from kdtrain.teacher_cache.shard import Shard, checksum
from kdtrain.teacher_cache.store import Store, StoreSpec, read_manifest, shard_paths
from kdtrain.teacher_cache.verify import verify
from tests.support.processes import run_processes
from tests.train.toy_work import (
    KINDS,
    TEXTS,
    ToyWork,
    fill,
    fill_as_one_of_two,
    spec_of,
    text_keys,
    wait_for_the_other,
)

ALL = ("logits", "states.1", "tokens.2", "hidden", "logprobs", "indices", "entropy")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def check(store: Store, accelerator: Accelerator, texts: list[str] = TEXTS) -> int:
    """`verify` of a store that is opened again."""
    again = Store.open(store.folder, store.spec)
    return verify(
        again,
        text_keys(texts),
        lambda numbers: ToyWork([texts[i] for i in numbers.tolist()]),
        accelerator,
        count=len(texts),
        seed=0,
    )


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in shard_paths(folder)}


def test_every_row_is_found_whatever_the_order(tmp_path: Path, accelerator: Accelerator) -> None:
    store, _ = fill(tmp_path, spec_of(*ALL), TEXTS, accelerator)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    rows = Store.open(tmp_path, store.spec).rows(text_keys([TEXTS[i] for i in order]))
    work = ToyWork([TEXTS[i] for i in order])
    chosen = [30, 3, 3, 17]
    found, wanted = rows.batch(chosen), work.compute(torch.tensor(chosen), ALL)
    for name in ALL:
        assert torch.equal(found[name].lengths, wanted[name].lengths)
        assert torch.equal(found[name].values, wanted[name].values.to(getattr(torch, KINDS[name].dtype))), (
            name
        )
    assert len(rows) == len(store) == len(TEXTS)


def test_more_rows_and_duplicates_cost_what_is_new(tmp_path: Path, accelerator: Accelerator) -> None:
    fill(tmp_path, spec_of("hidden"), TEXTS[:20], accelerator)
    before = contents(tmp_path)
    store, (work,) = fill(tmp_path, spec_of("hidden"), ["new", *TEXTS[10:25], "new"], accelerator)
    assert work.texts == ["new", *TEXTS[20:25]] and len(store) == 26
    assert {path: before[path] for path in before} == {path: contents(tmp_path)[path] for path in before}
    _, prepared = fill(tmp_path, spec_of("hidden"), TEXTS[:25], accelerator)
    assert prepared == [], "nothing was missing"


def test_a_store_is_widened_by_what_it_lacks(tmp_path: Path, accelerator: Accelerator) -> None:
    """Other layers of stored rows and all layers of new ones; what was written is neither read nor written again."""
    fill(tmp_path, spec_of("logits", "states.0"), TEXTS[:20], accelerator)
    before = contents(tmp_path)
    wide = spec_of("logits", "states.0", "states.3", "tokens.3")
    store, (work,) = fill(tmp_path, wide, TEXTS, accelerator)
    asked = dict(work.computed)
    assert len(asked) == len(work.computed) == len(TEXTS)
    for row, names in asked.items():
        assert names == (("states.3", "tokens.3") if row < 20 else tuple(wide.tensors))
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    manifest = read_manifest(tmp_path)
    assert manifest is not None and sorted(manifest["tensors"]) == sorted(wide.tensors)
    assert check(store, accelerator) == len(TEXTS)
    _, prepared = fill(tmp_path, spec_of("states.3"), TEXTS, accelerator)
    assert prepared == [], "fewer tensors than stored cost nothing"


def test_what_was_written_before_a_failure_is_kept(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a first build, and in a build that widens."""
    monkeypatch.setattr("kdtrain.teacher_cache.build.SHARD_ROWS", 4)
    done = 0
    for names in (("logits",), ("logits", "tokens.1")):
        with pytest.raises(RuntimeError, match="the machine failed"):
            fill(tmp_path, spec_of(*names), TEXTS, accelerator, limit=21)
        kept = int(Store.open(tmp_path, spec_of(*names)).find(names[-1], text_keys(TEXTS))[2].sum())
        assert 16 <= kept <= 21
        store, (work,) = fill(tmp_path, spec_of(*names), TEXTS, accelerator)
        assert len(work.computed) == len(TEXTS) - kept
        done += check(store, accelerator)
    assert done == 2 * len(TEXTS)


def test_every_flipped_byte_is_found(tmp_path: Path, accelerator: Accelerator) -> None:
    """Of values when they are read, of anything by verify; never silently used."""
    store, _ = fill(tmp_path, spec_of("logits", "hidden"), TEXTS[:3], accelerator)
    (path,) = [path for path in shard_paths(tmp_path) if "hidden" in load_file(path)]
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    values = len(whole) - header
    silent = 0
    for place in range(header, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            KdtrainError,
            match=rf"{path.name} (has changed since it was written|is damaged).*delete this one file",
        ):
            check(store, accelerator, TEXTS[:3])
        try:
            again = Store.open(tmp_path, store.spec)
            rows = again.rows(text_keys(TEXTS[:3]), ["hidden"]).batch([0, 1, 2])["hidden"]
            silent += not torch.equal(
                rows.values, ToyWork(TEXTS).compute(torch.arange(3), ["hidden"])["hidden"].values.bfloat16()
            )
        except KdtrainError as error:
            assert path.name in str(error) or "lacks hidden of 1 of 3 rows" in str(error)
    assert values > 500 and not silent
    path.write_bytes(whole)
    assert check(store, accelerator, TEXTS[:3]) == 3
    for place in range(8, header, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(KdtrainError):
            again = Store.open(tmp_path, store.spec)
            again.rows(text_keys(TEXTS[:3]))
            check(store, accelerator, TEXTS[:3])
    path.unlink()  # what the error advises
    _, (work,) = fill(tmp_path, store.spec, TEXTS[:3], accelerator)
    assert {names for _, names in work.computed} == {("hidden",)}
    assert check(store, accelerator, TEXTS[:3]) == 3


def reseal(path: Path, name: str, row: int) -> None:
    """Change the last number of the first element of one row, with the right checksum: what no checksum can find."""
    tensors = load_file(path)
    shard = Shard.of(path, tensors)
    first, size = int(shard.starts[row]), int(shard.sizes[row])
    values = tensors[name].clone()
    flat = values[first].reshape(-1)
    flat[-1] = flat[-1] + (40 if name == "indices" else 0.02 * (1 + float(flat[-1].abs())))
    values[first] = flat.reshape(values[first].shape)
    tensors[name] = values
    column = list(shard.tensors).index(name)
    part = values[first : first + size]
    tensors["checksums"][row, column] = checksum(
        shard.keys[row : row + 1].tobytes(), shard.lengths[row], name, part
    )
    save_file(tensors, path)


@pytest.mark.parametrize("name", ALL)
def test_verify_finds_what_the_teacher_does_not_compute(
    tmp_path: Path, accelerator: Accelerator, name: str
) -> None:
    """One wrong number of one element, sealed with a checksum: of every tensor, ids of top-k entries among them."""
    store, _ = fill(tmp_path, spec_of(*ALL), TEXTS, accelerator)
    assert check(store, accelerator) == len(TEXTS)
    (path,) = [path for path in shard_paths(tmp_path) if name in load_file(path)]
    reseal(path, name, 5)
    with pytest.raises(
        KdtrainError, match=r"row \w{32} of .*: .*(differ from the recomputed ones by|name a token twice)"
    ):
        check(store, accelerator)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher_weights": "seed 1"}, r"the hash of the weights of the teacher is 'seed 0' there and 'seed 1' here"),
        ({"max_length": 32}, r"\(teacher.max_length\) is 64 there and 32 here"),
        ({"precision": "bf16"}, r"the precision of the teacher \(teacher.precision\) is 'fp32' there"),
        ({"tensors": {"logits": KINDS["hidden"]}}, r"logits is \['float32', \[3\]\] there and \['bfloat16', \[6\]\] here"),
    ],
)  # fmt: skip
def test_another_store_is_refused(
    tmp_path: Path, accelerator: Accelerator, changes: dict[str, object], sentence: str
) -> None:
    fill(tmp_path, spec_of("logits"), TEXTS[:4], accelerator)
    before = contents(tmp_path)
    spec: StoreSpec = replace(spec_of("logits"), **changes)
    with pytest.raises(
        KdtrainError, match=sentence + r".*; set teacher.cache to another folder or delete that one"
    ):
        Store.open(tmp_path, spec)
    assert contents(tmp_path) == before


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    class Broken(ToyWork):
        value = float("nan")

        def compute(self, rows: Tensor, *rest: object) -> "dict[str, object]":
            found = super().compute(rows, *rest)  # type: ignore[arg-type]
            found["tokens.1"].values[3, 2] = self.value
            return found  # type: ignore[return-value]

    from kdtrain.teacher_cache.build import build

    store = Store.open(tmp_path, spec_of("tokens.1"))
    for value, sentence in (
        (float("nan"), "the teacher bytes computed tokens.1 that are NaN or infinite"),
        (
            1e5,
            r"tokens.1 of the teacher bytes reach 1e\+05, too large for float16; set teacher.dtype: float32",
        ),
    ):
        Broken.value = value
        with pytest.raises(KdtrainError, match=sentence):
            build(store, text_keys(TEXTS), lambda _: Broken(TEXTS), accelerator, batch_tokens=100)
    assert not shard_paths(tmp_path)


@pytest.mark.xdist_group("programs")
def test_two_processes_share_the_work(tmp_path: Path, accelerator: Accelerator) -> None:
    """Each computes half, each reads all; the store is the one that a single process makes, and it widens it."""
    alone, _ = fill(tmp_path / "alone", spec_of("logits", "hidden"), TEXTS, accelerator)
    (tmp_path / "results").mkdir()
    folder = str(tmp_path / "both")
    found = run_processes(fill_as_one_of_two, 2, tmp_path / "results", folder, ("logits", "hidden"))
    (first, read), (second, read_too) = found
    assert sorted([*first, *second]) == list(range(len(TEXTS)))
    assert min(len(first), len(second)) > 10 and read == read_too
    both = Store.open(tmp_path / "both", alone.spec)
    mine, theirs = (store.rows(text_keys(TEXTS)).batch(range(len(TEXTS))) for store in (alone, both))
    for name in alone.spec.tensors:
        assert torch.equal(mine[name].values, theirs[name].values)
    assert check(both, accelerator) == len(TEXTS)
    found = run_processes(fill_as_one_of_two, 2, tmp_path / "results", folder, ("states.2",))
    assert sum(len(one[0]) for one in found) == len(TEXTS)


@pytest.mark.xdist_group("programs")
def test_no_process_waits_longer_than_a_batch(tmp_path: Path) -> None:
    """A build of several seconds where every collective fails after one second; that the limit holds is shown first."""
    (tmp_path / "results").mkdir()
    results, folder = tmp_path / "results", str(tmp_path / "store")
    with pytest.raises(ProcessRaisedException, match="Timed out waiting 1000ms"):
        run_processes(wait_for_the_other, 2, results, 1.0)
    begun = time.monotonic()
    found = run_processes(fill_as_one_of_two, 2, results, folder, ("logits",), 0.4, 1.0)
    assert time.monotonic() - begun > 3.0
    assert sum(len(one[0]) for one in found) == len(TEXTS)


@pytest.mark.xdist_group("programs")
def test_second_builder_is_refused_on_all_its_processes(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with (
        writing(tmp_path / "store", "the teacher cache", "teacher.cache"),
        pytest.raises(Exception, match=r"another run \(process \d+\) is writing the teacher cache"),
    ):
        run_processes(fill_as_one_of_two, 2, tmp_path / "results", str(tmp_path / "store"), ("logits",))
    assert not shard_paths(tmp_path / "store") and not (tmp_path / "store" / "manifest.json").exists()


def test_damaged_manifest(tmp_path: Path, accelerator: Accelerator) -> None:
    fill(tmp_path, spec_of("logits"), TEXTS[:4], accelerator)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    for text, sentence in (
        ("{", "manifest.json is not readable JSON"),
        ("[]", "it holds list, not an object"),
        (json.dumps({**content, "tensors": 3}), "manifest.json is damaged, it has no tensors"),
        (
            json.dumps({**content, "format": 2}),
            "the file format is 2 there and 'kdtrain teacher store 3' here",
        ),
    ):
        path.write_text(text)
        with pytest.raises(KdtrainError, match=sentence):
            Store.open(tmp_path, spec_of("logits"))
    path.unlink()
    with pytest.raises(KdtrainError, match=r"has no manifest\.json, so nothing says whose outputs these are"):
        Store.open(tmp_path, spec_of("logits"))
