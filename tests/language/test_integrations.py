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
from kdtrain.language.trainer import KDConfig, KDTrainer
from tests.language.conftest import VOCABULARY, tiny

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def block(name: str) -> str:
    """The code of one block of the page."""
    return re.findall(rf"```python {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]


def tokens(rows: int = 32, masked: int = 0) -> Dataset:
    """Rows of 24 tokens, the first `masked` of which do not count."""
    ids = torch.randint(3, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(1)).tolist()
    labels = [[IGNORED] * (masked + i % 5) + row[masked + i % 5 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


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


def steps(tmp_path: Path, accumulation: int, rows: int = 16) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after two optimizer steps of 8 rows, cut into `accumulation` pieces."""
    student = tiny("llama")
    arguments = KDConfig(
        output_dir=str(tmp_path / f"{accumulation}"),
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        ce_weight=0.3,
    )
    trainer = KDTrainer(
        student,
        tiny("qwen3", 1, hidden_size=48),
        args=arguments,
        train_dataset=tokens(rows, 4),
        eval_dataset=tokens(6, 4),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [*losses, trainer.evaluate()["eval_loss"]], student.state_dict()


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Pieces with different numbers of labels: the same losses, the same student."""
    losses, weights = steps(tmp_path, 1)
    for accumulation in (2, 8):
        other, after = steps(tmp_path, accumulation)
        assert other == pytest.approx(losses, rel=1e-4)
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
