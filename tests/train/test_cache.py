"""The teacher cache: whose it is, and what it holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdtrain.data.tokens import tokenize
from kdtrain.errors import KdtrainError
from kdtrain.models.teachers import Teacher, load_teacher
from kdtrain.recipe import DataSection, TeacherSection
from kdtrain.tasks.classification.splits import ClassificationData, load_classification
from kdtrain.tasks.classification.teacher_outputs import (
    TeacherRows,
    filled_store,
    prepare_work,
    store_spec,
    teacher_outputs,
)
from kdtrain.teacher_cache.shard import keys_of
from kdtrain.teacher_cache.store import Store, StoreSpec, shard_paths
from kdtrain.teacher_cache.verify import verify
from tests.train.conftest import CLASSES, FOCUS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(toy: Path) -> ClassificationData:
    return load_classification(DataSection(path=str(toy)))


@pytest.fixture(scope="module")
def model(teacher: Path) -> Teacher:
    return load_teacher(str(teacher), CLASSES)


def spec_of(
    teacher: Teacher, dtype: str = "float32", layers: tuple[int, ...] = (1, 3), *, sequences: bool = False
) -> StoreSpec:
    return store_spec(teacher, focus=FOCUS, dtype=dtype, layers=layers, sequences=sequences)


def build(
    folder: Path, teacher: Teacher, spec: StoreSpec, data: ClassificationData, count: int = 40
) -> Store:
    rows = data.test.select(list(range(count)))
    prepare = prepare_work(teacher, rows, FOCUS, CPU)
    return filled_store(folder, spec, rows.keys(), prepare, Accelerator(cpu=True), batch_tokens=300)


def check(folder: Path, teacher: Teacher, spec: StoreSpec, data: ClassificationData) -> int:
    prepare = prepare_work(teacher, data.test, FOCUS, CPU)
    store, keys = Store.open(folder, spec), keys_of(data.test.keys())
    return verify(store, keys, prepare, Accelerator(cpu=True), count=10, seed=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_stored_outputs_are_the_teachers(
    tmp_path: Path, model: Teacher, data: ClassificationData, dtype: str, tolerance: float
) -> None:
    """Against the plain model on one row at a time, as a user would call it."""
    cache = build(tmp_path, model, spec_of(model, dtype), data)
    rows = TeacherRows(cache, data.test, (3,))
    lengths = tokenize(data.test.texts, model.tokenizer, 1000).lengths
    whole = [i for i in range(40) if lengths[i] <= model.max_length]  # the others are cut around the focus
    assert len(whole) > 10
    for i in whole:
        encoded = model.tokenizer(data.test.texts[i], return_tensors="pt")
        with torch.inference_mode():
            output = model.model(**encoded, output_hidden_states=True)
        torch.testing.assert_close(rows.logits[i], output.logits[0], rtol=1e-4, atol=1e-5)
        state = output.hidden_states[3][0, 0]
        torch.testing.assert_close(
            rows.states(torch.tensor([i]))[0, 0], state, rtol=tolerance, atol=tolerance
        )
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())


def test_manifest_says_whose_it_is(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    store = build(tmp_path, model, spec_of(model), data)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["teacher_weights"] == model.weights_hash()
    assert manifest["tokenizer"] == model.tokenizer_hash()
    assert (manifest["max_length"], manifest["focus"], manifest["dtype"]) == (64, FOCUS, "float32")
    assert (manifest["classes"], len(store)) == (3, 40)
    assert manifest["tensors"] == {
        "logits": ["float32", [3]],
        "states.1": ["float32", [48]],
        "states.3": ["float32", [48]],
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"teacher_weights": "0" * 32}, "the hash of the weights of the teacher is"),
        ({"tokenizer": "0" * 32}, "the hash of the tokenizer of the teacher is"),
        (
            {"max_length": 32},
            "the number of tokens the teacher sees of a row (teacher.max_length) is 64 there and 32 here",
        ),
        ({"focus": None}, "the focus marker of the data is '__HOLE__' there and None here"),
        (
            {"dtype": "float16"},
            "the dtype of stored states (teacher.dtype) is 'float32' there and 'float16' here",
        ),
        ({"classes": 20}, "the number of classes is 3 there and 20 here"),
        (
            {"outputs": "[1, 0] []"},
            "the inserted tokens of the teacher (teacher.class_order, teacher.insert) is '[] []' there",
        ),
    ],
)
def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, model: Teacher, data: ClassificationData, change: dict[str, Any], sentence: str
) -> None:
    build(tmp_path, model, spec_of(model), data, count=8)
    with pytest.raises(KdtrainError) as caught:
        Store.open(tmp_path, replace(spec_of(model), **change))
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "teacher.cache" in str(caught.value)


def test_a_teacher_with_one_other_weight_is_refused(
    tmp_path: Path, teacher: Path, model: Teacher, data: ClassificationData
) -> None:
    build(tmp_path / "cache", model, spec_of(model), data, count=8)
    changed = AutoModelForSequenceClassification.from_pretrained(teacher)
    with torch.no_grad():
        changed.classifier.out_proj.bias[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "changed")
    other = load_teacher(str(tmp_path / "changed"), CLASSES)
    with pytest.raises(
        KdtrainError, match=r"the hash of the weights of the teacher is '.*' there and '.*' here"
    ):
        Store.open(tmp_path / "cache", spec_of(other))
    assert load_teacher(str(teacher), CLASSES).weights_hash() == model.weights_hash()


def test_fewer_layers_and_known_rows_cost_nothing(
    tmp_path: Path, model: Teacher, data: ClassificationData, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, model, spec_of(model), data)
    said = capsys.readouterr().err
    assert "teacher cache: 40 rows (logits: 40 x 3 float32; states.1, states.3: 40 x 48 float32), " in said
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cache = build(tmp_path, model, spec_of(model, layers=(3,)), data)
    assert len(cache) == 40
    assert capsys.readouterr().err == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_cache_of_one_method_serves_another(
    tmp_path: Path, model: Teacher, data: ClassificationData
) -> None:
    """Layers and whole sequences that it lacks are added; logits and layers that it had stay byte for byte."""
    build(tmp_path, model, spec_of(model, layers=()), data)
    for layers, sequences in (((1, 3), False), ((2,), False), ((1, 2), True)):
        before = {path: path.read_bytes() for path in shard_paths(tmp_path)}
        spec = spec_of(model, layers=layers, sequences=sequences)
        store = build(tmp_path, model, spec, data)
        assert {path: path.read_bytes() for path in before} == before
        (added,) = [path for path in shard_paths(tmp_path) if path not in before]
        names = {name for name in load_file(added) if name not in ("keys", "lengths", "checksums")}
        assert (
            names
            == {(1, 3): {"states.1", "states.3"}, (2,): {"states.2"}, (1, 2): {"tokens.1", "tokens.2"}}[
                layers
            ]
        )
        assert len(store) == 40 and check(tmp_path, model, spec, data) == 10
    fresh = build(tmp_path / "fresh", model, spec_of(model, layers=(1, 2, 3), sequences=True), data)
    wide = Store.open(tmp_path, fresh.spec)
    for name in set(fresh.spec.tensors) - {"tokens.3"}:
        mine, theirs = (
            store.rows(keys_of(data.test.keys()), [name]).batch(range(40))[name].values
            for store in (wide, fresh)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_more_rows_are_added(tmp_path: Path, model: Teacher, data: ClassificationData) -> None:
    some = data.test.select(list(range(15)))
    first = TeacherRows(build(tmp_path, model, spec_of(model), data, count=15), some).logits
    cache = build(tmp_path, model, spec_of(model), data)
    assert len(cache) == 40 and len(list(tmp_path.glob("shard-*"))) == 2
    assert torch.equal(TeacherRows(cache, some).logits, first)


def test_teacher_that_cannot_be_used(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(KdtrainError, match=r"teacher.path: there is no folder ./nowhere"):
        load_teacher("./nowhere", CLASSES)
    with pytest.raises(KdtrainError, match=r"has 3 classes, the data set 2"):
        load_teacher(str(teacher), CLASSES[:2])
    with pytest.raises(
        KdtrainError, match=r"class 0 of the teacher .* is 'KeyError', of the data set 'OSError'"
    ):
        load_teacher(str(teacher), CLASSES[::-1])
    with pytest.raises(
        KdtrainError, match=r"teacher.max_length is 65, but the teacher .* reads at most 64 tokens"
    ):
        load_teacher(str(teacher), CLASSES, TeacherSection(max_length=65))
    with pytest.raises(KdtrainError, match=r"teacher layer 4 was asked for, but .* has 3 layers"):
        spec_of(load_teacher(str(teacher), CLASSES), layers=(4,))
    encoder = AutoModelForSequenceClassification.from_pretrained(teacher).roberta
    encoder.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path)
    with pytest.raises(
        KdtrainError, match=r"teacher.path: .* it lacks classifier\.dense\.bias, .* and 1 more"
    ):
        load_teacher(str(tmp_path), CLASSES)


def test_two_tokenizers_see_one_row(model: Teacher, data: ClassificationData) -> None:
    """The teacher is asked in its own tokens, cut to its own length."""
    short = replace(model, max_length=16)
    rows = tokenize(data.test.texts, short.tokenizer, short.max_length, FOCUS)
    outputs = teacher_outputs(short, rows, torch.arange(4), (), CPU)
    assert int(rows.lengths.max()) == 16 and outputs.logits.shape == (4, 3) and outputs.states is None


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_whole_sequences_are_the_teachers(
    tmp_path: Path,
    model: Teacher,
    data: ClassificationData,
    dtype: str,
    tolerance: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every real token of every layer, whatever batch it was computed in; first tokens come out of the same cache."""
    spec = spec_of(model, dtype, (0, 2), sequences=True)
    cache = build(tmp_path, model, spec, data)
    rows = tokenize(data.test.texts, model.tokenizer, model.max_length, FOCUS)
    size = {"float32": 4, "float16": 2}[dtype]
    tokens = int(rows.lengths.sum())
    assert f"tokens.0, tokens.2: {tokens} x 48 {dtype}), " in capsys.readouterr().err
    stored = sum(
        tensor.nbytes for shard in cache.shards for name, tensor in shard.tensors.items() if "tokens" in name
    )
    assert stored == tokens * 2 * 48 * size
    found, sentences = (TeacherRows(cache, data.test, (2, 0), sequences=each) for each in (True, False))
    index = torch.tensor([7, 3, 30])
    states, mask = found.sequences(index)
    assert mask.sum(1).tolist() == rows.lengths[index].tolist() and states.shape[:2] == (3, 2)
    for row, i in enumerate(index.tolist()):
        input_ids, ones = rows.batch(torch.tensor([i]))
        with torch.inference_mode():
            hidden = model.model(input_ids, ones, output_hidden_states=True).hidden_states
        expected = torch.stack([hidden[2][0], hidden[0][0]])
        torch.testing.assert_close(states[row, :, mask[row]], expected, rtol=tolerance, atol=tolerance)
        assert not bool(states[row, :, ~mask[row]].any())
        assert torch.equal(sentences.states(index)[row], states[row, :, 0])
    assert check(tmp_path, model, spec_of(model, dtype, (2,)), data) == 10
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build(tmp_path, model, spec_of(model, dtype, (2,)), data)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before, (
        "first tokens are stored too"
    )


def test_pairs_are_stored_text_by_text(tmp_path: Path, data: ClassificationData) -> None:
    """A row of two texts has two states, found under the content of both in their order."""
    rows = replace(data.test.select([0, 1]), seconds=data.test.texts[2:4])
    turned = replace(rows, texts=rows.seconds, seconds=rows.texts)
    assert len({*rows.keys(), *turned.keys()}) == 4
    assert rows.all_texts() == [*data.test.texts[:2], *data.test.texts[2:4]]
