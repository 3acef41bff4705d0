"""Kept tokens made elsewhere: they train as those of the own cache do, and what is wrong with them is told."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.cli import main
from kdtrain.doctor.code_lm import examine_language
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.recipe import LanguageRecipe, save_recipe
from kdtrain.run import run
from kdtrain.summary import Summary
from kdtrain.teacher_cache.external import ExternalStore
from tests.language.conftest import opened
from tests.language.test_cache import losses

KEPT = 24
PAGE = Path(__file__).parents[2] / "docs" / "code-lm.md"


@pytest.fixture(scope="module")
def shards(
    language_distillation: LanguageRecipe, sources: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """60 documents in two files, made by the code of the page."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, str(language_distillation.teacher.path), sources)
    return folder


def write_shards(folder: Path, given: str, sources: list[str]) -> None:
    """What the code of the page makes of these documents with the teacher at `given`."""
    code = re.findall(r"```python shards\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    names = {
        "teacher": AutoModelForCausalLM.from_pretrained(given),
        "tokenizer": AutoTokenizer.from_pretrained(given),
        "folder": str(folder),
    }
    for number, texts in enumerate((sources[:25], sources[25:])):
        changed = code.replace("KEPT, LONGEST = 64, 1024", f"KEPT, LONGEST = {KEPT}, 32")
        exec(changed, {**names, "texts": texts, "number": number})


@pytest.fixture(scope="module")
def recipe(
    language_distillation: LanguageRecipe, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> LanguageRecipe:
    """A short run from those shards, in rows of 32 tokens; there is no teacher."""
    return language_distillation.replaced(
        data=language_distillation.data.replaced(max_length=32),
        method=method_options("kd", temperature=1.0, ce_weight=0.5),
        teacher=language_distillation.teacher.replaced(path=str(shards), signal="shards"),
        training=language_distillation.training.replaced(max_steps=3, eval_steps=3, logging_steps=1),
        output=str(tmp_path_factory.mktemp("from_shards") / "run"),
    )


def test_equal_to_the_own_cache(
    recipe: LanguageRecipe, language_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tokens kept by `kdtrain cache` give the same losses; here nobody needs the teacher."""
    run(recipe)
    said = capsys.readouterr().err
    assert "top 24 entries of my teacher, which hold 8" in said and "% of the probability" in said
    own = recipe.replaced(
        teacher=recipe.teacher.replaced(path=str(language_teacher), signal="topk", top_k=KEPT),
        output=str(tmp_path / "own"),
    )
    run(own)
    found, wanted = losses(Path(recipe.output)), losses(tmp_path / "own")
    assert found == pytest.approx(wanted, rel=1e-5) and len(found) == 4
    summary = Summary.load(Path(recipe.output))
    assert summary.teacher is not None and summary.teacher["name"] == "my teacher"
    assert "divergence" not in summary.valid


def test_a_cache_of_this_program_is_a_folder_of_shards(
    recipe: LanguageRecipe, language_teacher: Path, tmp_path: Path
) -> None:
    """One format: what `kdtrain cache` stored, with the tokenizer beside it, trains elsewhere without the teacher."""
    own = recipe.replaced(
        teacher=recipe.teacher.replaced(path=str(language_teacher), signal="topk", top_k=KEPT),
        output=str(tmp_path / "own"),
    )
    run(own)
    folder = tmp_path / "copied"
    shutil.copytree(tmp_path / "own" / "teacher_cache" / "topk", folder)
    AutoTokenizer.from_pretrained(language_teacher).save_pretrained(folder)
    elsewhere = recipe.replaced(
        teacher=recipe.teacher.replaced(path=str(folder)), output=str(tmp_path / "run")
    )
    run(elsewhere)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "own"), rel=1e-5)
    (path, *_) = folder.glob("shard-*")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(KdtrainError, match=r"has changed since it was written .*; make or copy it again"):
        opened(elsewhere).external.verify()  # type: ignore[union-attr]


def test_tokens_in_front_of_a_document(
    recipe: LanguageRecipe, language_teacher: Path, sources: list[str], tmp_path: Path
) -> None:
    """The code of the page keeps what the tokenizer puts there, as the rows do."""
    shutil.copytree(language_teacher, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(language_teacher)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", str(tmp_path / "teacher"), sources)
    parts = opened(recipe.replaced(teacher=recipe.teacher.replaced(path=str(tmp_path / "shards"))))
    assert parts.shards is not None and (parts.rows[0].tokens == 0).sum() > 40


def test_other_values_are_another_teacher(recipe: LanguageRecipe, shards: Path, tmp_path: Path) -> None:
    """A run of shards that were made anew, by a teacher trained on, is no run that is finished already."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    before = ExternalStore.read(folder, 32).fingerprint
    assert ExternalStore.read(folder, 32).fingerprint == before
    spoil("logprobs", lambda tensor: (0.5 * tensor).log_softmax(-1))(folder)
    assert ExternalStore.read(folder, 32).fingerprint != before


@pytest.fixture(scope="module")
def arrow(
    shards: Path, recipe: LanguageRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, pa.Table]:
    """The documents of the first file once more, by the page's other code, and that file's table."""
    folder = tmp_path_factory.mktemp("arrow")
    for path in [*shards.glob("*.json")]:
        (folder / path.name).write_bytes(path.read_bytes())
    content = load_file(shards / "part-00000.safetensors")
    lengths = content["lengths"].tolist()
    names = {
        "documents": content["input_ids"].split(lengths),
        "logprobs": content["logprobs"].split(lengths),
        "ids": content["indices"].split(lengths),
        "folder": str(folder),
    }
    exec(re.findall(r"```python arrow\n(.*?)```", PAGE.read_text(), re.DOTALL)[0], names)
    (path,) = folder.glob("*.arrow")
    with pa.memory_map(str(path)) as source:
        return folder, pa.ipc.open_stream(source).read_all()


def test_arrow_files_hold_the_same(shards: Path, arrow: tuple[Path, pa.Table], tmp_path: Path) -> None:
    """As `datasets` writes them, and in several record batches of a file that is read in any order."""
    folder, table = arrow
    wanted = ExternalStore.read(shards, 32)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut, ignore=shutil.ignore_patterns("*.arrow"))
    with pa.ipc.new_file(str(cut / "any.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=7)
    for given, batches in ((folder, 1), (cut, -(-len(table) // 7))):
        found = ExternalStore.read(given, 32)
        assert len(found.shards) == batches and 20 < len(found) < len(wanted)
        found.verify()
        keys = np.concatenate([shard.keys for shard in found.shards])
        mine, theirs = (store.rows(keys).batch(range(len(keys))) for store in (found, wanted))
        for name in ("logprobs", "indices"):
            assert torch.equal(mine[name].values, theirs[name].values)
            assert torch.equal(mine[name].lengths, theirs[name].lengths)


def column(name: str, change: Callable[[list[Any]], object]) -> Callable[[pa.Table], pa.Table]:
    """Change the first row of one column, whose type stays."""

    def changed(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        change(values[0])
        place = table.schema.get_field_index(name)
        return table.set_column(place, name, pa.array(values, table.schema.field(name).type))

    return changed


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda table: table.drop_columns(["input_ids"]), r"has no input_ids \(it has indices, lengths, logprobs\)"),
        (lambda table: table.cast(table.schema.set(1, pa.field("logprobs", pa.list_(pa.list_(pa.float64()))))), r"logprobs must be float32 or float16 or bfloat16, got torch.float64"),
        (lambda table: table.set_column(0, "input_ids", pa.array([7] * len(table))), r"input_ids must be lists of numbers without nulls, got int64"),
        (column("input_ids", lambda row: row.__setitem__(0, None)), r"input_ids must be lists of numbers without nulls, got list<"),
        (column("input_ids", lambda row: row.pop()), r"the lists of a row must have as many entries as it has tokens"),
        (column("indices", lambda row: row[0].pop()), r"indices must hold equally many entries for every token, got 23 to 24"),
        (column("logprobs", lambda row: row[4].__setitem__(0, 0.5)), r"the entry of token 4 holds log-probabilities that are NaN, or above 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_arrow_files_is_told(
    arrow: tuple[Path, pa.Table], tmp_path: Path, damage: Callable[[pa.Table], pa.Table], sentence: str
) -> None:
    folder, table = arrow
    shutil.copytree(folder, tmp_path / "shards", ignore=shutil.ignore_patterns("*.arrow"))
    path = tmp_path / "shards" / "any.arrow"
    table = damage(table)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(KdtrainError, match=sentence):
        ExternalStore.read(tmp_path / "shards", 32).verify()
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(KdtrainError, match=r"any.arrow is damaged .*; make or copy it again"):
        ExternalStore.read(tmp_path / "shards", 32)


def test_longer_documents_are_cut_as_rows_are(recipe: LanguageRecipe) -> None:
    """Rows of 16 tokens find the halves of pieces of 32, whose entries knew all of the piece."""
    parts = opened(recipe.replaced(data=recipe.data.replaced(max_length=16)))
    assert parts.shards is not None
    index = torch.arange(6)
    batch = parts.shards.batch(index, torch.device("cpu"))
    outputs = batch.stored["teacher"]
    assert outputs["logprobs"].shape == (6, 16, KEPT)
    assert parts.external is not None
    tokens, logprobs = (
        torch.cat([shard.tensors[name] for shard in parts.external.shards])
        for name in ("input_ids", "logprobs")
    )
    for row in index.tolist():
        first = int((batch.positions[row] == 0).nonzero()[0])
        piece = batch.input_ids[row, first : first + 16]
        if len(piece) < 16 or not bool((batch.positions[row] == torch.arange(16)).all()):
            continue
        places = (tokens.unfold(0, 16, 1) == piece).all(-1).nonzero().flatten().tolist()
        assert any(torch.equal(logprobs[at : at + 16], outputs["logprobs"][row]) for at in places)


def test_command_and_doctor(
    recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert main(["cache", str(tmp_path / "recipe.yaml"), "--verify"]) == 0
    assert "all values are log-probabilities of different tokens" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "recipe.yaml"), "--plan"]) == 0
    levels = {finding.text: finding.level for finding in examine_language(recipe)}
    assert set(levels.values()) == {"info"} and any("top 24 entries of my teacher" in text for text in levels)


def spoil(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Change one tensor of the first file."""

    def write(folder: Path) -> None:
        path = folder / "part-00000.safetensors"
        content = {key: tensor.clone() for key, tensor in load_file(path).items()}
        content[name] = change(content[name])
        save_file(content, path)

    return write


def late(folder: Path) -> None:
    """Entry i says what token i is and not what follows it, as servers number their log-probabilities."""
    for path in folder.glob("part-*"):
        content = {
            key: tensor.roll(1, 0) if key in ("logprobs", "indices") else tensor.clone()
            for key, tensor in load_file(path).items()
        }
        save_file(content, path)


def keeps_all(folder: Path) -> None:
    """Every token of the vocabulary is kept."""
    manifest(top_k=286)(folder)
    for path in folder.glob("part-*"):
        content = load_file(path)
        entries = torch.full((len(content["input_ids"]), 286), 1 / 286).log()
        everything = torch.arange(286, dtype=torch.int32).expand(len(entries), -1).contiguous()
        save_file({**content, "logprobs": entries, "indices": everything}, path)


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Overwrite the best entry of the fifth token."""

    def change(tensor: Tensor) -> Tensor:
        tensor[4, 0] = value
        return tensor

    return change


def manifest(**fields: object) -> Callable[[Path], None]:
    """Change fields of the manifest."""

    def write(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return write


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"there is no .*manifest.json; with teacher.signal shards"),
        (manifest(format=2), r"must name the format 'kdtrain teacher store 3', got 2"),
        (manifest(top_k="many"), r"top_k must be a whole number above 0, got 'many'"),
        (manifest(top_k=8), r"logprobs must have shape \(\d+, 8\) for documents of"),
        (lambda folder: [path.unlink() for path in folder.glob("part-*")], r"holds no .safetensors or .arrow file"),
        (lambda folder: (folder / "part-00001.safetensors").unlink(), r"segments of the training documents are not in"),
        (lambda folder: (folder / "part-00001.safetensors").write_bytes(b"0" * 99), r"is damaged .*; make or copy it again"),
        (spoil("lengths", lambda tensor: tensor.int()), r"lengths must be int64, got torch.int32"),
        (spoil("lengths", lambda tensor: tensor + 1), r"input_ids must have shape"),
        (spoil("logprobs", first(0.5)), r"the entry of token 4 holds log-probabilities that are NaN, or above 0"),
        (spoil("logprobs", lambda tensor: tensor * 0), r"the entry of token 0 holds probabilities whose sum is"),
        (spoil("indices", first(286)), r"token 4 holds ids outside of 0 to 285, the tokens that"),
        (spoil("indices", lambda tensor: tensor * 0), r"the entry of token 0 holds one id twice"),
        (keeps_all, r"keeps all 286 tokens and leaves nothing for teacher.tail bucket; set it to renormalize"),
        (late, r"are misaligned: entry i scores token i \(loss "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(
    recipe: LanguageRecipe, shards: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(KdtrainError, match=sentence):
        opened(recipe.replaced(teacher=recipe.teacher.replaced(path=str(folder))))
