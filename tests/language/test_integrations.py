"""The blocks of docs/integrations.md run as they stand; KDTrainer keeps Trainer's contract."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from kdtrain.errors import KdtrainError
from kdtrain.language.packing import IGNORED, padded_batch
from kdtrain.language.trainer import KDConfig, KDTrainer, collate_counted
from tests.language.conftest import tiny
from tests.language.trainer_steps import steps, tokens

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def block(name: str) -> str:
    """The code of one block of the page."""
    return re.findall(rf"```python {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]


def names(tmp_path: Path) -> dict[str, Any]:
    return {
        "student": tiny("llama"),
        "teacher": tiny("qwen3", 1, hidden_size=48),
        "dataset": tokens(),
        "folder": str(tmp_path / "out"),
    }


def test_plain_loop(tmp_path: Path) -> None:
    found = names(tmp_path)
    exec(block("plain"), found)
    halves = [sum(found["losses"][:4]), sum(found["losses"][-4:])]
    assert halves[1] < halves[0], "it learns"


def test_trainer(tmp_path: Path) -> None:
    found = names(tmp_path)
    exec(block("trainer"), found)
    untrained = KDTrainer(
        tiny("llama"),
        found["teacher"],
        args=found["arguments"],
        eval_dataset=tokens(),
        train_dataset=tokens(),
    ).evaluate()
    assert 0 < found["metrics"]["eval_divergence"] < untrained["eval_divergence"]
    assert 0 <= found["metrics"]["eval_agreement"] <= 1
    saved = list((tmp_path / "out").rglob("model.safetensors"))
    assert saved and all(path.stat().st_size < 200_000 for path in saved), "no teacher in the checkpoint"


# TRL 1.16 sets a name that transformers deprecates; ends when TRL uses the new one.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    found = names(tmp_path) | {"tokenizer": tokenizer, "texts": Dataset.from_dict({"text": sources})}
    exec(block("trl"), found)
    assert found["trainer"].state.global_step == 3


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Pieces with different numbers of labels: the same losses, the same student."""
    known, weights = steps(tmp_path)
    for accumulation in (2, 8):
        found, after = steps(tmp_path, accumulation=accumulation)
        for name, values in known.items():
            assert found[name] == pytest.approx(values, rel=1e-4), name
        for name, tensor in weights.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_collated_batches_are_read_right() -> None:
    """Padding on either side and documents that share a row."""
    ids = torch.tensor([[1, 1, 5, 6, 7], [5, 6, 7, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.where(mask == 1, ids, IGNORED)
    batch = padded_batch({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, -100, 6, 7, -100], [6, 7, -100, -100, -100]]
    places = torch.tensor([[0, 1, 0, 1, 2]])
    packed = padded_batch({"input_ids": ids[1:], "labels": ids[1:], "position_ids": places})
    assert packed.labels.tolist() == [[6, -100, 1, 1, -100]]


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"the heads of student and teacher have 300 and 310 rows"):
        KDTrainer(
            tiny("llama"),
            tiny("llama", vocab_size=310),
            args=KDConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=tokens(),
        )


def test_trainer_counts_what_the_loss_counts() -> None:
    """Trainer counts labels[:, 1:] for itself: first tokens of documents, after padding or another document, must not be there."""
    rows = {
        "input_ids": torch.tensor([[1, 1, 5, 6, 7], [5, 6, 7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 0, 1, 2]]),
    }
    rows["labels"] = torch.where(rows["attention_mask"] == 1, rows["input_ids"], IGNORED)
    counted = padded_batch(dict(rows)).labels
    labels = collate_counted(lambda given: given, dict(rows))["labels"]
    assert int((labels[:, 1:] != IGNORED).sum()) == int((counted != IGNORED).sum()) == 5
    assert torch.equal(padded_batch(rows | {"labels": labels}).labels, counted)


def test_batches_without_labels_and_cut_documents_are_told(tmp_path: Path) -> None:
    masked = Dataset.from_dict({"input_ids": tokens(8)["input_ids"], "labels": [[IGNORED] * 24] * 8})
    trainer = KDTrainer(
        tiny("llama"),
        tiny("qwen3", 1),
        args=KDConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[]),
        train_dataset=masked,
    )
    with pytest.raises(KdtrainError, match=r"step 1 has no label that counts: all labels .* are -100"):
        trainer.train()
    cut = {
        "input_ids": torch.full((2, 4), 5),
        "labels": torch.full((2, 4), 5),
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 6, 7]]),
    }
    with pytest.raises(
        KdtrainError, match=r"row 1 .* position 6 stands at its token 2, where 0 or 2 was due"
    ):
        collate_counted(lambda given: given, cut)
