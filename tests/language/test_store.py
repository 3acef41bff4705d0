"""Rows on disk: the rows of memory, whatever the windows; little memory; the same run; other data is told."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageDataSection, LanguageRecipe
from kdtrain.run import run
from kdtrain.tasks.code_lm.documents import document_windows, load_documents, load_held_out, read_rows
from kdtrain.tasks.code_lm.packing import PackedRows, pack
from kdtrain.tasks.code_lm.store import stored_rows


def contents(rows: PackedRows) -> list[bytes]:
    """Every row's tokens, labels and positions, in no order."""
    parts = (rows.tokens, rows.labels, rows.positions)
    cuts = zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
    return sorted(b"".join(part[a : a + n].numpy().tobytes() for part in parts) for a, n in cuts)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_those_of_memory(
    language_recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, packing: bool
) -> None:
    """One window gives the same rows in the same order; many windows the same documents without packing."""
    recipe = language_recipe.data.replaced(packing=packing, store=str(tmp_path / "one"))
    known = [pack(part, recipe.max_length, 1, packing=packing) for part in load_documents(recipe, tokenizer)]
    stored = stored_rows(recipe, tokenizer, 1)
    many = stored_rows(recipe.replaced(store=str(tmp_path / "many")), tokenizer, 1, window_tokens=1)
    for ours, theirs, others in zip(
        (stored.train, stored.valid), known, (many.train, many.valid), strict=True
    ):
        for name in ("tokens", "labels", "positions", "starts", "lengths", "counted"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
        index = torch.tensor([len(theirs) - 1, 0])
        for name in ("input_ids", "labels", "position_ids"):
            cpu = torch.device("cpu")
            assert torch.equal(getattr(ours.batch(index, cpu), name), getattr(theirs.batch(index, cpu), name))
        assert int(others.counted.sum()) == int(theirs.counted.sum())
        assert packing or contents(others) == contents(theirs)
    held_out = load_documents(recipe, tokenizer)[1]
    assert load_held_out(recipe, tokenizer).fingerprint() == held_out.fingerprint()


def test_documents_stream_and_rows_stay_on_disk(
    language_recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No more than a window of tokens is in memory while a store is made, and none of it afterwards."""
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": f"x_{i} = {i}\n"}) + "\n" for i in range(4000)))
    recipe = LanguageDataSection(train=str(path), max_length=64, store=str(tmp_path / "rows"))
    sizes = [
        len(window.tokens)
        for window in document_windows(read_rows(str(path), "data.train", recipe), recipe, tokenizer, 8000)
    ]
    assert len(sizes) > 3 and 8000 <= max(sizes) < 8000 + 512 * 20, sizes
    rows = stored_rows(recipe, tokenizer, 1, window_tokens=8000).train
    maps = Path("/proc/self/maps").read_text().splitlines()
    for name in ("tokens", "labels", "positions"):
        (line,) = [line for line in maps if line.endswith(f"rows/train/{name}.i32")]
        first, last = (int(place, 16) for place in line.split()[0].split("-"))
        assert first <= getattr(rows, name).data_ptr() < last, f"{name} is a copy"


def test_a_run_from_disk_is_the_run_from_memory(
    language_recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = language_recipe.training.replaced(max_steps=4, eval_steps=2)
    recipe = language_recipe.replaced(training=training, output=str(tmp_path / "memory"))
    stored = recipe.data.replaced(store=str(tmp_path / "rows"))
    run(recipe)
    run(recipe.replaced(data=stored, output=str(tmp_path / "disk")))
    assert f"data.store: tokenizing {recipe.data.train} into {tmp_path}/rows, once" in capsys.readouterr().err
    run(recipe.replaced(data=stored, output=str(tmp_path / "again")))
    assert "tokenizing" not in capsys.readouterr().err
    weights = [
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("memory", "disk", "again")
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor) and torch.equal(weights[2][name], tensor), name


def test_stores_of_other_data_are_told(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": f"x = {i}\n"}) + "\n" for i in range(200)))
    recipe = LanguageDataSection(train=str(path), max_length=32, store=str(tmp_path / "rows"))
    stored_rows(recipe, tokenizer, 1)
    with pytest.raises(KdtrainError, match=r"rows was made otherwise \(data.max_length: 32 there, 64 here\)"):
        stored_rows(recipe.replaced(max_length=64), tokenizer, 1)
    os.utime(path, ns=(1, 1))
    with pytest.raises(KdtrainError, match=r"rows was made otherwise \(files.train: "):
        stored_rows(recipe, tokenizer, 1)
    again = recipe.replaced(store=str(tmp_path / "again"))
    stored_rows(again, tokenizer, 1)
    with open(tmp_path / "again" / "train" / "labels.i32", "ab") as file:
        file.truncate(8)
    with pytest.raises(KdtrainError, match=r"labels.i32 is damaged: it has changed since it was written"):
        stored_rows(again, tokenizer, 1)
    masked = recipe.replaced(held_out=1e-9, store=str(tmp_path / "none"))
    with pytest.raises(KdtrainError, match="leaves no row with a label that counts to measure on"):
        stored_rows(masked, tokenizer, 1)
    assert not (tmp_path / "none").exists(), "nothing half written"
    (tmp_path / "folder").mkdir()
    with pytest.raises(KdtrainError, match="folder is not a store of rows"):
        stored_rows(recipe.replaced(store=str(tmp_path / "folder")), tokenizer, 1)
